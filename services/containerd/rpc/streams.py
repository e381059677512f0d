"""``theseus.shim.v1.Streams`` at containerd: passed through to the shim of the container.

Only the first message is read, to know which shim; everything else goes through as bytes, in both
directions, at the pace of the slower side. A call that is cancelled is cancelled at the shim. One
that starts a process is made again if the shim goes away before it has answered, as calls of the
task API are.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from protos.theseus.shim.v1 import streams_pb2 as pb
from services.common.background import Background
from services.common.errors import InvalidArgument, Unavailable
from services.common.server import request_namespace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.common.draining import Draining
    from services.common.message_stream import MessageStream
    from services.containerd.rpc.context import Context
    from services.containerd.tasks.manager import TaskManager

SERVICE = pb.DESCRIPTOR.services_by_name["Streams"].full_name


class StreamsService:
    """Passes ``Attach`` on."""

    def __init__(self, tasks: TaskManager, draining: Draining) -> None:
        self._tasks = tasks
        self._draining = draining

    async def Attach(
        self, request_iterator: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """See the contract. Messages are serialized ones."""
        first = await anext(request_iterator, None) or b""
        start = _start(first)
        namespace = request_namespace(context)
        answer: bytes | None = None
        if start.HasField("process"):
            attachment, answer = await self._tasks.run_exec(
                namespace, start.container_id, start.exec_id, first
            )
        else:
            attachment = await self._tasks.attach(namespace, start.container_id, first)
        # Not a finally: a call that is cancelled during a write leaves this generator hanging.
        context.add_done_callback(lambda _: attachment.close())  # type: ignore[arg-type]  # its stub
        async with self._draining.endless(), Background() as background:
            background.start(_pass_on(request_iterator, attachment), name="requests of an attach")
            if answer is not None:
                yield answer
            while (response := await attachment.receive()) is not None:
                yield response


def add_streams_to_server(servicer: StreamsService, server: Any) -> None:
    """As a generated ``add_StreamsServicer_to_server``, without serializers."""
    handler: Any = grpc.stream_stream_rpc_method_handler(
        servicer.Attach, request_deserializer=None, response_serializer=None
    )
    server.add_registered_method_handlers(SERVICE, {"Attach": handler})


def _start(first: bytes) -> pb.AttachStart:
    try:
        request = pb.AttachRequest.FromString(first)
    except DecodeError as error:
        raise InvalidArgument("the first message of an attach does not parse") from error
    if not request.start.container_id:
        raise InvalidArgument(
            "the first message of an attach must be a start with a container id",
            field="start.container_id",
        )
    return request.start


async def _pass_on(requests: AsyncIterator[bytes], attachment: MessageStream) -> None:
    with suppress(Unavailable):  # whoever reads the responses sees it too
        async for message in requests:
            await attachment.send(message)
        await attachment.end()
