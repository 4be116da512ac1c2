"""What reaches the SuperLink of what others send: by path, by length, by account."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from flwr.proto.node_pb2 import Node

from deepfusion.flower.door import (
    ANNOUNCEMENTS,
    ANNOUNCES,
    ASKS,
    CALL_BYTES,
    SENDS,
    Application,
    behind_the_door,
    reply_limit,
)

LIMIT = 3 * CALL_BYTES
PIECE = 1 << 20


class Superlink:
    """Answers every call that reaches it: `status`, and `answer` as its body."""

    def __init__(self, status: int = 200, answer: bytes = b"") -> None:
        self.status, self.answer = status, answer
        self.read: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        length, is_more = 0, scope["type"] == "http"
        while is_more:
            message = await receive()
            length, is_more = length + len(message["body"]), message["more_body"]
        self.read.append(length)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.answer})


class Caller:
    """One caller and the door; `taken` counts the bytes that were read of its calls."""

    def __init__(self, superlink: Superlink | None = None) -> None:
        self.superlink = superlink or Superlink()
        self.door: Application = behind_the_door(self.superlink, LIMIT)
        self.taken = 0

    def __call__(
        self,
        path: str,
        length: int = 0,
        *,
        client: str = "10.0.0.2",
        kind: str = "http",
        key: bytes = b"mine",
        content: bytes | None = None,
        said: bytes | None = None,
    ) -> int:
        """The status of a call whose body comes in pieces of 1 MiB."""
        pieces = self._pieces(length) if content is None else iter([content])
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            piece = next(pieces, b"")
            self.taken += len(piece)
            return {"type": "http.request", "body": piece, "more_body": bool(piece)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"flwr-public-key", key)]
        headers += [(b"content-length", said)] if said is not None else []
        scope = {"type": kind, "path": path, "headers": headers}
        scope |= {"client": (client, 1), "server": ("10.0.0.1", 8000)}
        asyncio.run(self.door(scope, receive, send))  # type: ignore[arg-type]
        return int(sent[0]["status"])

    def _pieces(self, length: int) -> Iterator[bytes]:
        while length > 0:
            yield bytes(min(PIECE, length))
            length -= PIECE


def test_other_machines_reach_the_calls_of_a_node_alone() -> None:
    call = Caller()
    for path in ("/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet"):
        assert call(path) == 403, path
        assert call(path, client="10.0.0.1") == call(path, client="127.0.0.1") == 200, path
        assert call(path, kind="websocket") == 403, path
    assert call(ASKS) == 200


def test_a_call_that_is_too_long_is_not_read_to_its_end() -> None:
    call = Caller()
    assert call(ASKS, CALL_BYTES) == 200
    assert call.superlink.read == [CALL_BYTES]
    call = Caller()
    assert call(ASKS, 100 * CALL_BYTES) == 413
    assert call.taken <= CALL_BYTES + PIECE
    call = Caller()
    for said in (b"%d" % (CALL_BYTES + 1), b"9" * 4000, b"-1", b"many"):
        assert call(ASKS, 100, said=said) == 413, said
    assert call.taken == 0
    assert call.superlink.read == []


def test_this_machines_own_calls_are_as_long_as_they_like() -> None:
    call = Caller()
    assert call("/v1/runtime/push-object", 2 * CALL_BYTES, client="127.0.0.1") == 200
    assert call.superlink.read == [2 * CALL_BYTES]


def test_a_reply_ends_where_a_reply_can_end() -> None:
    call = Caller()
    assert [call(SENDS, CALL_BYTES) for _ in range(4)] == [200, 200, 200, 413]
    assert call(SENDS, CALL_BYTES, key=b"another") == 200, "each node has its own account"
    # asking where there is nothing changes nothing; a new message begins a new account
    assert call(ASKS) == 200
    assert call(SENDS, CALL_BYTES) == 413
    call.superlink.answer = b"a message"
    assert call(ASKS) == 200
    assert call(SENDS, CALL_BYTES) == 200


def test_who_is_not_let_in_fills_nobodys_account() -> None:
    call = Caller(Superlink(status=401))
    assert [call(SENDS, CALL_BYTES) for _ in range(9)] == [401] * 9
    call.superlink.status = 200
    assert [call(SENDS, CALL_BYTES) for _ in range(3)] == [200] * 3


def announced(node: int, source: int, reply_to: str) -> bytes:
    metadata = Metadata(src_node_id=source, reply_to_message_id=reply_to)
    request = PushMessagesRequest(
        node=Node(node_id=node), messages_list=[Message(metadata=metadata)]
    )
    return request.SerializeToString()


@pytest.mark.parametrize(
    "content, status",
    [
        (announced(7, 7, "question"), 200),
        (announced(7, 8, "question"), 403),
        (announced(7, 7, ""), 403),
        (b"\xff\xff", 403),
    ],
    ids=["own", "in-anothers-name", "an-order", "garbage"],
)
def test_a_node_answers_and_for_itself(content: bytes, status: int) -> None:
    assert Caller()(ANNOUNCES, content=content) == status


def test_announcements_are_few_and_short() -> None:
    call = Caller()
    own = announced(7, 7, "question")
    given = [call(ANNOUNCES, content=own) for _ in range(ANNOUNCEMENTS + 1)]
    assert given == [200] * ANNOUNCEMENTS + [413]
    long = announced(7, 7, "x" * (LIMIT // 2048 + (64 << 10)))
    assert Caller()(ANNOUNCES, content=long) == 413


def test_an_honest_shard_has_room() -> None:
    """Pieces of 1 MiB, each with a name and two hashes; see `records.pack`."""
    for shard in (1 << 20, 256 << 20, 2048 << 20):
        pieces = shard >> 20
        assert shard + pieces * 1000 + (1 << 20) < reply_limit(shard)
        assert pieces * 300 + 1000 < reply_limit(shard) // 2048 + (64 << 10)
