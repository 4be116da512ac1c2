"""Runs one of Flower's long-lived programs, and ends it with the process that started it.

A SuperLink whose `deepfusion serve` was killed would hold the port for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from .door import behind_the_door

CHECK_SECONDS = 0.5
LEAVE_SECONDS = 15.0
# how much a node may send for one message
REPLY_BYTES = "DEEPFUSION_REPLY_BYTES"


def end_with(parent: int) -> None:
    """Ctrl-C to this process once its parent is another one than `parent`; then, no mercy."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(CHECK_SECONDS)
        signal.raise_signal(signal.SIGINT)
        # a SuperNode takes leave of its server, and tries for ever where that one is gone as well
        time.sleep(LEAVE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """python -m deepfusion.flower.child PARENT superlink|supernode ARGUMENTS"""
    _, parent, program, *arguments = sys.argv
    sys.argv = [f"flower-{program}", *arguments]
    end_with(int(parent))
    if program == "superlink":
        from flwr.superlink import main as superlink
        from flwr.superlink.cli import flower_superlink

        genuine, limit = superlink.create_app, int(os.environ[REPLY_BYTES])
        superlink.create_app = lambda *given: behind_the_door(genuine(*given), limit)
        flower_superlink()
    else:
        from flwr.supernode.cli import flower_supernode

        flower_supernode()


if __name__ == "__main__":
    main()
