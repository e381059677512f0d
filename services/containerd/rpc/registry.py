"""``theseus.shim.v1.Registry``: where shims register and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.shim.v1 import registry_pb2 as pb
from protos.theseus.shim.v1 import registry_pb2_grpc
from services.common.background import Background
from services.common.errors import InvalidArgument
from services.containerd.rpc.encoding import nanoseconds
from services.containerd.tasks.journal import ShimEvent
from services.containerd.tasks.registration import Hello, HelloProcess
from services.containerd.tasks.shim import ProcessExit, Stdio
from services.containerd.typed import TypedValue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.rpc.context import Context
    from services.containerd.tasks.registration import ShimSession
    from services.containerd.tasks.shims import ShimManager


class RegistryService(registry_pb2_grpc.RegistryServicer):
    """Serves the register of shims."""

    def __init__(self, shims: ShimManager) -> None:
        self._shims = shims

    async def Register(
        self, request_iterator: AsyncIterator[pb.RegisterRequest], context: Context
    ) -> AsyncIterator[pb.RegisterResponse]:
        """See the contract."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidArgument("the first message of a registration must be hello")
        welcome, session = await self._shims.register(hello_from_pb(first.hello))
        # Not a finally: a call that is cancelled during a write leaves this generator hanging.
        context.add_done_callback(lambda _: session.close())  # type: ignore[arg-type]  # its stub
        yield pb.RegisterResponse(
            welcome=pb.Welcome(
                containerd_id=welcome.containerd_id,
                epoch=welcome.epoch,
                last_acked_seq=welcome.last_acked_seq,
                protocol=welcome.protocol,
            )
        )
        async with Background() as background:
            background.start(_read(request_iterator, session), name="events of a shim")
            while (seq := await session.next_ack()) is not None:
                yield pb.RegisterResponse(ack=pb.Ack(seq=seq))


async def _read(request_iterator: AsyncIterator[pb.RegisterRequest], session: ShimSession) -> None:
    try:
        async for message in request_iterator:
            if message.WhichOneof("message") != "event":
                session.end(InvalidArgument("after hello only events are expected"))
                return
            await session.offer(event_from_pb(message.event))
    finally:
        session.end()


def hello_from_pb(message: pb.Hello) -> Hello:
    """A Hello off the wire."""
    return Hello(
        namespace=message.namespace,
        id=message.id,
        instance_id=message.instance_id,
        pid=message.pid,
        start_time=message.pid_start_time,
        boot_id=message.boot_id,
        address=message.address,
        version=message.version,
        protocol_min=message.protocol_min,
        protocol_max=message.protocol_max,
        bundle=message.bundle,
        processes=tuple(_process_from_pb(process) for process in message.processes),
        first_seq=message.first_seq,
        last_seq=message.last_seq,
    )


def event_from_pb(message: pb.Event) -> ShimEvent:
    """An event off the wire, its message as it is."""
    return ShimEvent(
        message.seq,
        nanoseconds(message.timestamp),
        message.topic,
        TypedValue(message.event.type_url, message.event.value),
    )


def _process_from_pb(message: pb.ProcessState) -> HelloProcess:
    end = None
    if message.status == "stopped" and not message.exit_status_lost:
        end = ProcessExit(message.exit_status, nanoseconds(message.exited_at), message.pid)
    stdio = None
    if message.HasField("streams"):
        told = message.streams
        stdio = Stdio(told.stdin, told.stdout, told.stderr, told.terminal)
    return HelloProcess(
        message.container_id, message.exec_id, message.pid, message.status, end, stdio
    )
