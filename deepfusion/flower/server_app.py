"""The server's half of the protocol: one message at a time for a device, devices side by side.

    hello -> base.. -> train -> shard 0, 1, .. -> close        until all are done, or the deadline

A device that is gone, and comes back, begins again with hello: what it trained lies on its disk,
what was received lies on ours. This process only collects; it never opens a tensor.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from ..messages import PROTOCOL
from . import records
from .collection import Standing, Wanted, write_standings
from .talk import Ask, Talk, hello_facts

app = ServerApp()
WANTED = "DEEPFUSION_WANTED"
POLL_SECONDS = 0.5


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


class Collector:
    """The loop over all devices, with one deadline for all."""

    def __init__(self, grid: Grid, wanted: Wanted) -> None:
        self.grid = grid
        self.wanted = wanted
        self.standings = {one.device: Standing() for one in wanted.devices}
        self.talks = [Talk(one, wanted, self.standings[one.device]) for one in wanted.devices]
        self.begun = time.monotonic()
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

    def _pull(self, talk: Talk) -> None:
        replies = list(self.grid.pull_messages([talk.pending]))
        if replies:
            self._probes.pop(talk.device.device, None)
            talk.standing.seconds = round(time.monotonic() - self.begun, 1)
            self._push(talk, talk.take(replies.pop()))
        elif time.monotonic() - talk.since > self.wanted.probe_seconds:
            self._probe(talk)

    def _probe(self, talk: Talk) -> None:
        """A node answers in order: an answered probe shows that the message before it is lost.

        Flower notices a node that is gone, not one that was started again within a minute.
        """
        device = talk.device.device
        if device not in self._probes:
            ask = Ask(records.HELLO, hello_facts(talk.device, self.wanted))
            self._probes[device] = self._send(talk.node, ask)
        elif list(self.grid.pull_messages([self._probes[device]])):
            del self._probes[device]
            if not (replies := list(self.grid.pull_messages([talk.pending]))):
                talk.lost()
            else:
                self._push(talk, talk.take(replies.pop()))

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
