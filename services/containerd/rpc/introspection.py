"""``containerd.services.introspection.v1.Introspection``: what this server is made of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from protos.containerd.services.introspection.v1 import introspection_pb2 as pb
from protos.containerd.services.introspection.v1 import introspection_pb2_grpc
from protos.containerd.types import introspection_pb2, platform_pb2
from services.common import VERSION
from services.common.errors import InvalidArgument, NotFound, Unimplemented
from services.containerd import plugins
from services.containerd.rpc.version import REVISION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.empty_pb2 import Empty

    from services.containerd.rpc.context import Context


class IntrospectionService(introspection_pb2_grpc.IntrospectionServicer):
    """Serves the list of plugins.

    Args:
        all_plugins: what there is.
        uuid: of this root, the same for ever.
        runtimes: names of the runtimes that tasks run on.
    """

    def __init__(
        self, all_plugins: Sequence[plugins.Plugin], *, uuid: str, runtimes: Sequence[str]
    ) -> None:
        self._plugins = all_plugins
        self._uuid = uuid
        self._pidns = Path("/proc/self/ns/pid").stat().st_ino
        self._runtimes = runtimes

    async def Plugins(self, request: pb.PluginsRequest, context: Context) -> pb.PluginsResponse:
        """See the contract."""
        return pb.PluginsResponse(plugins=map(_to_pb, plugins.find(self._plugins, request.filters)))

    async def Server(self, request: Empty, context: Context) -> pb.ServerResponse:
        """See the contract."""
        return pb.ServerResponse(uuid=self._uuid, pid=os.getpid(), pidns=self._pidns)

    async def PluginInfo(
        self, request: pb.PluginInfoRequest, context: Context
    ) -> pb.PluginInfoResponse:
        """See the contract. Only the runtimes have more to tell than the list does."""
        named = [p for p in self._plugins if (p.type, p.id) == (request.type, request.id)]
        if not named:
            raise NotFound(
                f"plugin {request.type}.{request.id} does not exist",
                resource=("plugin", f"{request.type}.{request.id}"),
            )
        response = pb.PluginInfoResponse(plugin=_to_pb(named[0]))
        if request.HasField("options"):
            if request.type != plugins.RUNTIME:
                raise Unimplemented(f"plugin {request.type}.{request.id} answers no questions")
            info = self._runtime_info(request.options.value)
            response.extra.type_url = info.DESCRIPTOR.full_name
            response.extra.value = info.SerializeToString()
        return response

    def _runtime_info(self, question: bytes) -> introspection_pb2.RuntimeInfo:
        asked = introspection_pb2.RuntimeRequest()
        try:
            asked.ParseFromString(question)
        except DecodeError as error:
            raise InvalidArgument("the question is no RuntimeRequest", field="options") from error
        name = asked.runtime_path
        if name not in self._runtimes:
            raise NotFound(
                f"runtime {name!r} is not known: try one of {', '.join(self._runtimes)}",
                resource=("runtime", name),
            )
        return introspection_pb2.RuntimeInfo(
            name=name,
            version=introspection_pb2.RuntimeVersion(version=VERSION, revision=REVISION),
        )


def _to_pb(plugin: plugins.Plugin) -> pb.Plugin:
    message = pb.Plugin(
        type=plugin.type,
        id=plugin.id,
        requires=plugin.requires,
        platforms=[
            platform_pb2.Platform(os=p.os, architecture=p.architecture, variant=p.variant)
            for p in plugin.platforms
        ],
        exports=dict(plugin.exports),
        capabilities=plugin.capabilities,
    )
    if plugin.error:
        code, _ = grpc.StatusCode.UNKNOWN.value
        message.init_err.CopyFrom(status_pb2.Status(code=code, message=plugin.error))
    return message
