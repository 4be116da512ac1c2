"""Two tiny devices over TLS, and one without a key that counts: part of `make test`."""

import ssl
from collections.abc import Callable
from pathlib import Path

import httpx

from deepfusion.device.gather import gather as in_process
from deepfusion.flower.keys import make_keys

from .federation import Federation


def status_from(address: str, fed: Federation, path: str) -> int:
    """What the server answers to a caller at an address of this machine."""
    context = ssl.create_default_context(cafile=str(fed.keys / "ca.crt"))
    transport = httpx.HTTPTransport(verify=context, local_address=address)
    with httpx.Client(transport=transport, timeout=60) as client:
        return client.post(f"https://127.0.0.1:{fed.port}{path}", content=b"").status_code


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
    # 127.0.0.2 is not the server's own address: it stands for another machine
    for path in ("/v1/control/register-node", "/v1/control/start-run", "/v1/runtime/acquire-task"):
        assert status_from("127.0.0.2", fed, path) == 403, path
    assert status_from("127.0.0.1", fed, "/v1/control/list-runs") != 403
    received = fed.end(work)
    assert [one.status for one in fed.standings().values()] == ["done", "done"]

    alone = federation()
    wanted = in_process(alone.jobs())
    for got, want in zip(received, wanted, strict=True):
        assert bytes_of(got) == bytes_of(want)
