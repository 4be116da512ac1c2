"""A node that speaks Flower's protocol by hand, to send what no device of ours would."""

import hashlib
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supernode.fleet_http_connection import http_request_response

from deepfusion.flower import records
from deepfusion.flower.door import CALL_BYTES, reply_limit

from .federation import Federation, wait_for

pytestmark = pytest.mark.network
Make = Callable[..., Federation]
MIB = 1 << 20


class Node:
    """A registered node in the hands of somebody else."""

    def __init__(self, calls: tuple[Any, ...]) -> None:
        _, self.receive, self._send, _, _, _, self._push, _ = calls

    def next_message(self) -> Message:
        """What it is asked; it need not be read."""
        last = time.monotonic() + 60
        while time.monotonic() < last:
            if (found := self.receive()) is not None:
                message: Message = found[0]
                return message
            time.sleep(0.2)
        raise AssertionError("after 60 s still not asked")

    def announce(self, question: Message, name: str, tree: ObjectTree) -> str:
        """Says that a reply is coming; the session in which its parts are taken."""
        reply = Message(RecordDict(), reply_to=question)
        reply.metadata.__dict__["_message_id"] = name
        session: str = self._send(reply, tree, 0.0)[1]
        return session

    def push(self, question: Message, session: str, name: str, content: bytes) -> None:
        self._push(question.metadata.run_id, session, name, content)


@contextmanager
def node(fed: Federation, device: int) -> Iterator[Node]:
    folder = fed.keys / f"device-{device:02d}"
    key = load_ssh_private_key((folder / "device.key").read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)
    address, authority = f"localhost:{fed.port}", (folder / "ca.crt").read_bytes()
    pair = (key, key.public_key())
    with http_request_response(address, False, authority, pair, max_retries=0) as calls:
        yield Node(calls)


def send_too_much(hostile: Node) -> int:
    """Pieces without end as one reply; how many MiB were taken before a piece was refused."""
    question = hostile.next_message()
    pieces = (hashlib.sha256(b"%d" % index).digest() * (MIB // 32) for index in range(64))
    reply = Message(records.pack({}, pieces), reply_to=question)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    session = hostile.announce(question, reply.object_id, get_object_tree(reply))
    taken = 0

    def push_all() -> None:
        nonlocal taken
        for name, one in get_all_nested_objects(reply).items():
            content = one.deflate()
            hostile.push(question, session, name, content)
            taken += len(content)

    with pytest.raises(httpx.HTTPStatusError, match="413"):
        push_all()
    return taken // MIB


def send_garbage(hostile: Node) -> None:
    """A message whose hash and length are right, and whose bytes are none."""
    question = hostile.next_message()
    body = b"\xff" * 40
    content = b"Message  %d\0%s" % (len(body), body)
    name = hashlib.sha256(content).hexdigest()
    session = hostile.announce(question, name, ObjectTree(object_id=name))
    hostile.push(question, session, name, content)


def superlink_of(fed: Federation) -> psutil.Process:
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "deepfusion.flower.child" in line and "superlink" in line and str(fed.port) in line:
            return process
    raise AssertionError("no SuperLink of this test")


def pour(fed: Federation, mib: int) -> None:
    """One call of a stranger without a key, as long as the server reads it."""
    context = ssl.create_default_context(cafile=str(fed.keys / "ca.crt"))
    url = f"https://localhost:{fed.port}/v1/fleet/push-object"
    try:
        with httpx.Client(verify=context, timeout=60) as client:
            answer = client.post(url, content=(bytes(MIB) for _ in range(mib)))
            assert answer.status_code == 413
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return  # it closed the connection while we were still sending


def test_hostile_nodes_neither_fill_the_server_nor_end_the_round(federation: Make) -> None:
    fed = federation(
        "federation.num_devices=3",
        "federation.min_devices=1",
        "federation.deadline_seconds=100",
        "upload.shard_mib=1",
    )
    fed.trained(0)
    work = fed.collect()
    fed.join(0)
    process = superlink_of(fed)
    before = process.memory_info().rss
    pour(fed, 400)
    assert process.memory_info().rss - before < 100 * MIB, "a call of 400 MiB was held"
    with node(fed, 1) as greedy, node(fed, 2) as garbled:
        most = reply_limit(MIB) // MIB
        assert most - CALL_BYTES // MIB <= send_too_much(greedy) <= most
        assert process.memory_info().rss - before < 150 * MIB
        send_garbage(garbled)
        wait_for(lambda: fed.status(2) == "refused", 60, "garbage is noticed")
    received = fed.end(work)
    assert [folder.name for folder in received] == ["device-00"]
    standings = fed.standings()
    assert standings["device-00"].status == "done"
    assert standings["device-01"].status == "unavailable"
    assert standings["device-02"].reason.startswith("its answer cannot be read: ")
