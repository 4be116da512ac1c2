"""Two tiny devices over TLS, and one without a key that counts: part of `make test`."""

from collections.abc import Callable
from pathlib import Path

from deepfusion.device.gather import gather as in_process
from deepfusion.flower.keys import make_keys

from .federation import Federation


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_devices_send_the_bytes_that_one_process_makes(
    federation: Callable[..., Federation],
) -> None:
    """A stranger with a key of its own making is beside them, and is not heard."""
    fed = federation()
    other = fed.folder / "other-keys"
    make_keys(other, (), 1)
    (other / "device-00" / "ca.crt").write_bytes((fed.keys / "ca.crt").read_bytes())
    work = fed.collect()
    fed.join(0, f"run.output='{fed.folder / 'stranger'}'", keys=other / "device-00")
    for device in range(2):
        fed.join(device)
    received = fed.end(work, 120)
    assert [one.status for one in fed.standings().values()] == ["done", "done"]

    alone = federation()
    wanted = in_process(alone.jobs())
    for got, want in zip(received, wanted, strict=True):
        assert bytes_of(got) == bytes_of(want)
