"""What another machine may ask of the SuperLink: the calls of a node, and nothing else.

Flower serves its control and its run-time calls on the same port as the nodes' calls, and asks for
no name there: whoever reaches the port could register a key of his own, or start a run whose code
every device then executes. Here those calls are for this machine alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Any, Send], Awaitable[None]]
FOR_NODES = "/v1/fleet/"
LOOPBACK = ("127.0.0.1", "::1")
FORBIDDEN = 403


def is_local(scope: Scope) -> bool:
    """Whether both ends of the connection are this machine: a peer cannot have our own address."""
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    return client[0] in LOOPBACK or client[0] == server[0]


def behind_the_door(application: Application) -> Application:
    """The application, closed to other machines but for the nodes' calls."""

    async def guarded(scope: Scope, receive: Any, send: Send) -> None:
        is_call = scope["type"] != "lifespan"
        if is_call and not scope["path"].startswith(FOR_NODES) and not is_local(scope):
            headers = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": FORBIDDEN, "headers": headers})
            await send({"type": "http.response.body", "body": b"for this machine alone"})
            return
        await application(scope, receive, send)

    return guarded
