"""The server's half of the protocol: one message at a time for a device, devices side by side.

    hello -> base.. -> train -> shard 0, 1, .. -> close        until all are done, or the deadline

A device that is gone, and comes back, begins again with hello: what it trained lies on its disk,
what was received lies on ours. This process only collects; it never opens a tensor.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import UnexpectedObjectContentError
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..messages import PROTOCOL
from . import records
from .collection import Standing, Wanted, write_standings
from .talk import Ask, Gone, Talk, hello_facts

app = ServerApp()
WANTED = "DEEPFUSION_WANTED"
POLL_SECONDS = 0.5
# replies that are fetched side by side, each held twice meanwhile; a small one is there at once
PULLS, PULL_PATIENCE = 4, 0.2
# after which a reply that still comes in is given up: 256 MiB need 4 Mbit/s
PULL_SECONDS = 600.0
ANSWERED = "answered"
# what Flower raises while it puts a message together out of bytes that are none
UNREADABLE = (
    UnexpectedObjectContentError,
    DecodeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    RecursionError,
)


def _claimed(reply: Message) -> str:
    """The name that a node without a key gives itself."""
    try:
        return "" if reply.has_error() else str(records.facts_of(reply.content).get("device"))
    except ValueError:
        return ""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Collect what `serve` wrote down as wanted."""
    Collector(grid, Wanted.read(Path(os.environ[WANTED]))).run()


class Pull(threading.Thread):
    """Fetches the reply to one message, if there is one; failure: what Flower raised."""

    def __init__(self, grid: Grid, name: str) -> None:
        super().__init__(daemon=True)
        self.grid = grid
        self.name = name
        self.begun = time.monotonic()
        self.replies: list[Message] = []
        self.failure: Exception | None = RuntimeError("a reply was not fetched; see superlink.log")

    def run(self) -> None:
        """Ask once; Flower waits for parts that were announced and have not come yet."""
        try:
            self.replies = list(self.grid.pull_messages([self.name]))
            self.failure = None
        except (httpx.HTTPError, OSError, RuntimeError, *UNREADABLE) as failure:
            self.failure = failure


class Collector:
    """The loop over all devices, with one deadline for all."""

    def __init__(self, grid: Grid, wanted: Wanted) -> None:
        self.grid = grid
        self.wanted = wanted
        self.standings = {one.device: Standing() for one in wanted.devices}
        self.talks = [Talk(one, wanted, self.standings[one.device]) for one in wanted.devices]
        self.begun = time.monotonic()
        self._pulls: dict[str, Pull] = {}
        self._probes: dict[str, str] = {}
        self._strangers: dict[int, str] = {}
        self._written = ""

    def run(self) -> None:
        """Until no answer can come any more, or the deadline passes."""
        while any(talk.is_open for talk in self.talks) and self.left() > 0:
            online = set(self.grid.get_node_ids())
            self._greet(online)
            for talk in self.talks:
                if talk.is_idle and talk.node in online:
                    self._push(talk, talk.begin())
                elif talk.pending:
                    self._pull(talk)
            self._show()
            time.sleep(POLL_SECONDS)
        for talk in self.talks:
            if talk.standing.status in ("training", "uploading"):
                talk.close("late", "not ready at the deadline")
            elif talk.standing.status == "waiting":
                talk.close("unavailable", "never seen" if not talk.pending else "never answered")
        self._show()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.begun + self.wanted.deadline_seconds - time.monotonic()

    def _send(self, node: int, ask: Ask) -> str:
        content = records.pack(ask.facts, ask.pieces)
        message = Message(content, node, ask.kind, ttl=max(self.left(), 1.0))
        (name,) = self.grid.push_messages([message])
        return str(name)

    def _push(self, talk: Talk, ask: Ask | None) -> None:
        if ask is not None:
            talk.pending = self._send(talk.node, ask)
            talk.since = time.monotonic()

    def _fetch(self, name: str) -> list[Message] | None:
        """The reply to a message; [] where there is none yet, None while it still comes in.

        One that comes in by drops must not keep the others waiting. Raises what Flower raises;
        Gone after PULL_SECONDS.
        """
        pull = self._pulls.get(name)
        if pull is None:
            if len(self._pulls) >= PULLS:
                return None
            pull = self._pulls[name] = Pull(self.grid, name)
            pull.start()
            pull.join(PULL_PATIENCE)
        if pull.is_alive():
            if time.monotonic() - pull.begun <= PULL_SECONDS:
                return None
            # its thread ends by itself, and its reply goes nowhere
            pull.failure = Gone("answer came too slowly")
        del self._pulls[name]
        if pull.failure is not None:
            raise pull.failure
        return pull.replies

    def _pull(self, talk: Talk) -> None:
        device = talk.device.device
        try:
            replies = self._fetch(talk.pending)
            if replies:
                self._probes.pop(device, None)
                talk.standing.seconds = round(time.monotonic() - self.begun, 1)
                self._push(talk, talk.take(replies.pop()))
            elif replies is not None:
                self._ask_again(talk, device)
        except Gone:
            self._probes.pop(device, None)
            talk.lost()
        except UNREADABLE as fault:
            self._push(talk, talk.refuse(f"its answer cannot be read: {type(fault).__name__}"))

    def _ask_again(self, talk: Talk, device: str) -> None:
        """A node answers in order: an answered probe shows that the message before it is lost.

        Flower notices a node that is gone, not one that was started again within a minute.
        """
        probe = self._probes.get(device)
        if probe == ANSWERED:
            raise Gone("restarted")
        if probe is not None:
            if self._fetch(probe):
                # the reply itself may have come since it was looked for
                self._probes[device] = ANSWERED
        elif time.monotonic() - talk.since > self.wanted.probe_seconds:
            ask = Ask(records.HELLO, hello_facts(talk.device, self.wanted))
            self._probes[device] = self._send(talk.node, ask)

    def _greet(self, online: set[int]) -> None:
        """Without keys nobody knows which node is whose: each is asked once for its name."""
        nameless = {talk.device.device: talk for talk in self.talks if not talk.node}
        known = {talk.node for talk in self.talks}
        for node in sorted(online - known - self._strangers.keys()) if nameless else ():
            self._strangers[node] = self._send(node, Ask(records.HELLO, {"protocol": PROTOCOL}))
        for node, name in self._strangers.items():
            for reply in self.grid.pull_messages([name]) if name else ():
                self._strangers[node] = ""
                if talk := nameless.pop(_claimed(reply), None):
                    talk.node, talk.standing.node = node, str(node)

    def _show(self) -> None:
        text = repr(self.standings)
        if text != self._written:
            write_standings(self.wanted.folder, self.standings)
            self._written = text
