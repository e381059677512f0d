"""``theseus.engine.v1.Containers``."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from protos.theseus.engine.v1 import containers_pb2_grpc
from services.daemon.containers.logs import LogSelection
from services.daemon.containers.runtime import StreamKind
from services.daemon.containers.wait import Condition
from services.daemon.rpc import messages, streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.common.draining import Draining
    from services.daemon.containers.attach import Attacher
    from services.daemon.containers.logfile import LogEntry
    from services.daemon.containers.manager import ContainerManager
    from services.daemon.containers.record import ContainerRecord
    from services.daemon.rpc.context import Context

_CONDITIONS = {
    pb.WaitContainerRequest.CONDITION_NEXT_EXIT: Condition.NEXT_EXIT,
    pb.WaitContainerRequest.CONDITION_REMOVED: Condition.REMOVED,
}


class ContainersService(containers_pb2_grpc.ContainersServicer):
    """Serves containers."""

    def __init__(self, manager: ContainerManager, attacher: Attacher, draining: Draining) -> None:
        self._manager = manager
        self._attacher = attacher
        self._draining = draining

    async def Create(
        self, request: pb.CreateContainerRequest, context: Context
    ) -> pb.CreateContainerResponse:
        """See the contract."""
        config = messages.config_from_pb(request.config)
        record, warnings = await self._manager.create(config, name=request.name)
        return pb.CreateContainerResponse(id=record.id, name=record.name, warnings=warnings)

    async def Start(
        self, request: pb.StartContainerRequest, context: Context
    ) -> pb.StartContainerResponse:
        """See the contract."""
        await self._manager.start(request.container)
        return pb.StartContainerResponse()

    async def Stop(
        self, request: pb.StopContainerRequest, context: Context
    ) -> pb.StopContainerResponse:
        """See the contract."""
        given = request.HasField("timeout")
        timeout_s = messages.duration_s(request.timeout) if given else None
        await self._manager.stop(request.container, timeout_s=timeout_s)
        return pb.StopContainerResponse()

    async def Kill(
        self, request: pb.KillContainerRequest, context: Context
    ) -> pb.KillContainerResponse:
        """See the contract."""
        await self._manager.kill(request.container, request.signal)
        return pb.KillContainerResponse()

    async def Remove(
        self, request: pb.RemoveContainerRequest, context: Context
    ) -> pb.RemoveContainerResponse:
        """See the contract."""
        removed = await self._manager.remove(
            request.container, force=request.force, volumes=request.volumes
        )
        return pb.RemoveContainerResponse(id=removed)

    async def Wait(
        self, request: pb.WaitContainerRequest, context: Context
    ) -> pb.WaitContainerResponse:
        """See the contract."""
        condition = _CONDITIONS.get(request.condition, Condition.NOT_RUNNING)
        async with self._draining.endless():
            status = await self._manager.wait(request.container, condition)
        return pb.WaitContainerResponse(
            exit=None if status is None else messages.exit_to_pb(status)
        )

    async def Get(
        self, request: pb.GetContainerRequest, context: Context
    ) -> pb.GetContainerResponse:
        """See the contract."""
        return pb.GetContainerResponse(container=self._to_pb(self._manager.get(request.container)))

    async def List(
        self, request: pb.ListContainersRequest, context: Context
    ) -> pb.ListContainersResponse:
        """See the contract."""
        records = self._manager.list_all(stopped=request.all)
        return pb.ListContainersResponse(containers=[self._to_pb(record) for record in records])

    async def Logs(
        self, request: pb.LogsRequest, context: Context
    ) -> AsyncIterator[pb.LogsResponse]:
        """See the contract."""
        entries = self._manager.logs(request.container, _selection(request))
        await context.send_initial_metadata(())  # tells a follower that there is such a log
        async with self._draining.endless(), aclosing(entries) as batches:
            async for batch in batches:
                yield pb.LogsResponse(entries=[_entry_to_pb(entry) for entry in batch])

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        """See the contract."""
        start = await streams.first_request(request_iterator)
        session = self._attacher.container(
            start.container, streams.target(start), streams.inputs(request_iterator)
        )
        async with self._draining.endless(), aclosing(session) as outputs:
            async for output in outputs:
                yield streams.output_to_pb(output)

    def _to_pb(self, record: ContainerRecord) -> pb.Container:
        return messages.container_to_pb(record, log_path=self._manager.log_path(record.id))


def _selection(request: pb.LogsRequest) -> LogSelection:
    wanted = {
        kind
        for kind, asked in (
            (StreamKind.STDOUT, request.stdout),
            (StreamKind.STDERR, request.stderr),
        )
        if asked
    }
    return LogSelection(
        follow=request.follow,
        tail=request.tail if request.HasField("tail") else None,
        since_ns=request.since.ToNanoseconds(),
        until_ns=request.until.ToNanoseconds(),
        streams=frozenset(wanted or StreamKind),
        skip_bytes=request.offset,
    )


def _entry_to_pb(entry: LogEntry) -> pb.LogEntry:
    return pb.LogEntry(
        timestamp=messages.timestamp(entry.timestamp_ns),
        stream=streams.STREAM_KINDS[entry.stream],
        data=entry.data,
    )
