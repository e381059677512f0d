"""``containerd.services.version.v1.Version``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.containerd.services.version.v1 import version_pb2 as pb
from protos.containerd.services.version.v1 import version_pb2_grpc
from services.common import VERSION

if TYPE_CHECKING:
    from google.protobuf.empty_pb2 import Empty

    from services.containerd.rpc.context import Context

REVISION = "theseus"


class VersionService(version_pb2_grpc.VersionServicer):
    """Says which program this is."""

    async def Version(self, request: Empty, context: Context) -> pb.VersionResponse:
        """See the contract."""
        return pb.VersionResponse(version=VERSION, revision=REVISION)
