"""`python benchmarks/compare.py OLD.json NEW.json`: ratios of medians; exit 1 past 10 % slower."""

import json
import sys
from pathlib import Path

LIMIT = 1.10


def medians(path: str) -> dict[tuple[str, str, str, str], float]:
    rows = json.loads(Path(path).read_text())["rows"]
    return {
        (row["op"], row["case"], row["dtype"], row["variant"]): row["median_ms"] for row in rows
    }


def main(old: str, new: str) -> int:
    before, after = medians(old), medians(new)
    slower = 0
    for key in sorted(before.keys() & after.keys()):
        ratio = after[key] / before[key]
        slower += ratio > LIMIT
        print(f"{ratio:6.2f}  {after[key]:9.3f} ms  {' '.join(key)}")
    for key in sorted(before.keys() ^ after.keys()):
        print(f"  only in {'old' if key in before else 'new'}: {' '.join(key)}")
    return int(slower > 0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
