"""Our SuperLink's control port: who may join, start the collection, how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest, StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from .. import files
from ..messages import TransportFailed

COMPLETED = "finished:completed"
# what Flower sends to the devices: names of installed modules, no code and no weights
APP = """[project]
name = "deepfusion-collection"
version = "1.0.0"
description = "One round of uploads"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "deepfusion"

[tool.flwr.app.components]
serverapp = "deepfusion.flower.server_app:app"
clientapp = "deepfusion.flower.client_app:app"

[tool.flwr.app.config]
"""


@dataclass(frozen=True)
class RunEnd:
    """How a run stands: `status` is Flower's status and sub-status, `details` its own words."""

    status: str
    details: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.status.startswith("finished")


@contextmanager
def _one_sentence(doing: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, ConnectionError) as fault:
        raise TransportFailed(
            f"the SuperLink did not answer while {doing} ({type(fault).__name__}); "
            "see network/superlink.log"
        ) from None


class Control:
    """Speaks to the SuperLink that `launch` started; certificate None: plaintext."""

    def __init__(self, address: str, certificate: Path | None) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=certificate is None,
            root_certificates=certificate.read_bytes() if certificate else None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="deepfusion")],
        )

    def answers(self) -> bool:
        """Whether the SuperLink is up, and is ours: another program's certificate is not."""
        try:
            self._client.ListRuns(ListRunsRequest())
        except (httpx.HTTPError, OSError):
            return False
        return True

    def register(self, public_key: Path) -> int:
        """Let the holder of a key join; the id that its node will have."""
        key = load_ssh_public_key(public_key.read_bytes())
        if not isinstance(key, EllipticCurvePublicKey):
            raise ValueError(f"{public_key}: must be a key made by `deepfusion keys`")
        request = RegisterNodeRequest(
            public_key=public_key_to_bytes(key), name=public_key.stem, location=None
        )
        with _one_sentence(f"registering {public_key.stem}"):
            return int(self._client.RegisterNode(request).node_id)

    def start(self, folder: Path) -> int:
        """Start the collection; the run's id."""
        files.write_text(folder / "pyproject.toml", APP)
        content = build_fab_from_disk(folder)
        fab = fab_to_proto(Fab(sha256(content).hexdigest(), content, {}))
        request = StartRunRequest(
            fab=fab,
            override_config={},
            federation="",
            override_federation_config=None,
            app_spec="",
        )
        with _one_sentence("starting the collection"):
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise TransportFailed("the SuperLink started no run; see network/superlink.log")
        return int(answer.run_id)

    def end_of(self, run: int) -> RunEnd:
        """The run's status: the only word of Flower's that is to be trusted."""
        with _one_sentence("collecting"):
            found = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        status = f"{found.status}:{found.sub_status}" if found.sub_status else found.status
        return RunEnd(status, found.details)
