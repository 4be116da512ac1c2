"""What another machine may ask of the SuperLink: the calls of a node, of a size that we expect.

Flower serves its control and its run-time calls on the same port as the nodes' calls, and asks for
no name there: whoever reaches the port could register a key of his own, or start a run whose code
every device then executes. Here those calls are for this machine alone.

It also reads a call whole before it asks who sent it, and keeps whatever a node sends until
somebody fetches it. Here a call is refused once it is longer than Flower's own, and a node's reply
once it is longer than a reply can be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Any, Send], Awaitable[None]]
FOR_NODES = "/v1/fleet/"
ASKS, ANNOUNCES, SENDS = (
    FOR_NODES + name for name in ("pull-messages", "push-messages", "push-object")
)
LOOPBACK = ("127.0.0.1", "::1")
KEY = b"flwr-public-key"
FORBIDDEN, TOO_LARGE, FAILURES = 403, 413, 400
# of one call: Flower sends what is longer than 5 MiB in parts
CALL_BYTES = 8 << 20
# announcing a reply costs the server memory for each of its parts; Flower tries again when in doubt
ANNOUNCEMENTS = 4
# beside the shard, for names and lengths of its pieces, and for a manifest
MARGIN_BYTES = 8 << 20


def reply_limit(shard_bytes: int) -> int:
    """How much a node may send for one message: a shard, and what Flower puts around it."""
    return shard_bytes + shard_bytes // 16 + MARGIN_BYTES


def is_local(scope: Scope) -> bool:
    """Whether both ends of the connection are this machine: a peer cannot have our own address."""
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    return client[0] in LOOPBACK or client[0] == server[0]


@dataclass
class Account:
    """What a node has sent since it was last given a message."""

    bytes: int = 0
    announcements: int = 0

    def has_room(self, path: str, length: int, limit: int) -> bool:
        """Whether one more call may be read."""
        if path == ANNOUNCES:
            # some 150 bytes for each piece of 1 MiB
            return self.announcements < ANNOUNCEMENTS and length <= limit // 2048 + (64 << 10)
        return path != SENDS or self.bytes + length <= limit

    def note(self, path: str, length: int, answer: int) -> None:
        """A call of the node itself: its key was verified. answer: bytes of what it was told."""
        if path == ASKS and answer:
            # the message before it was answered, or given up
            self.bytes = self.announcements = 0
        self.announcements += path == ANNOUNCES
        self.bytes += length if path == SENDS else 0


def behind_the_door(application: Application, limit: int) -> Application:
    """The application, closed to other machines but for the nodes' calls, and those bounded.

    limit: bytes of a node's reply to one message.
    """
    accounts: dict[bytes, Account] = {}

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await application(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].startswith(FOR_NODES):
            await bounded(scope, receive, send)
        elif is_local(scope):
            await application(scope, receive, send)
        else:
            await _refuse(send, FORBIDDEN, b"for this machine alone")

    async def bounded(scope: Scope, receive: Receive, send: Send) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        key = headers.get(KEY, b"")
        account = accounts.get(key, Account())
        body = await _read(receive, headers)
        if body is None or not account.has_room(path, len(body), limit):
            await _refuse(send, TOO_LARGE, b"more than was asked for")
            return
        if path == ANNOUNCES and not _is_own_reply(body):
            await _refuse(send, FORBIDDEN, b"a node answers, for itself")
            return
        status = answer = 0

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += len(message.get("body", b""))
            await send(message)

        await application(scope, _again(body, receive), noted)
        if status < FAILURES:
            # only who was let in has an account: strangers cannot fill it, nor our memory
            accounts.setdefault(key, account).note(path, len(body), answer)

    return guarded


async def _read(receive: Receive, headers: MutableMapping[bytes, bytes]) -> bytes | None:
    """The body of a call; None as soon as it is, or says that it will be, too long."""
    said = headers.get(b"content-length", b"0")
    if not said.isdigit() or int(said[:20]) > CALL_BYTES:
        return None
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > CALL_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the body that was read for it, then whatever follows."""
    left = [body]

    async def given() -> MutableMapping[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return given


def _is_own_reply(body: bytes) -> bool:
    """Whether an announcement is of replies by the node that makes it.

    Flower would take a message of one node to another, and one in another's name.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    return all(
        one.metadata.reply_to_message_id and one.metadata.src_node_id == request.node.node_id
        for one in request.messages_list
    )


async def _refuse(send: Send, status: int, why: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why})
