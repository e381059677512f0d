"""Our own shim, over gRPC: implements :class:`services.containerd.tasks.shim.Shim`."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from protos.theseus.shim.v1 import control_pb2, control_pb2_grpc
from services.common.client import connect
from services.common.errors import TheseusError, Unavailable
from services.common.rpc_errors import translated
from services.containerd.clients.sandbox_api import SandboxApiClient
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.shim import ProgramInfo, Reexecuted, ShimAddress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from google.protobuf.message import Message

    from services.containerd.clients.task_api import Answer
    from services.containerd.tasks.shim import Attachment, ShimRequest

ATTACH_METHOD = "/theseus.shim.v1.Streams/Attach"

_QUICK_S = 30.0
_SLOW_S = 600.0


class ShimClient(SandboxApiClient):
    """One shim's services on one channel, which connects when first used.

    Args:
        namespace: containerd's.
        container_id: whose task the shim runs.
        address: ``unix://PATH``.
    """

    def __init__(self, *, namespace: str, container_id: str, address: str) -> None:
        super().__init__(container_id)
        self._channel = connect(address, namespace=namespace)
        self._methods: dict[str, Any] = {}
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._closed = False

    async def host(self, request: ShimRequest) -> ShimAddress:
        """As ``Shim.host``."""
        message = control_pb2.HostRequest(
            namespace=request.namespace,
            id=request.id,
            bundle=str(request.bundle),
            instance_id=request.instance_id,
            adopt=request.adopt,
        )
        with self._call():
            answer = await self._control.Host(message, timeout=_QUICK_S)
        process = ProcessId(answer.pid, answer.pid_start_time)
        return ShimAddress(process, answer.address, answer.version)

    async def leave(self, *, now: bool = False) -> None:
        """As ``Shim.leave``."""
        with self._call():
            request = control_pb2.LeaveRequest(id=self._id, now=now)
            await self._control.Leave(request, timeout=_QUICK_S)

    async def info(self) -> ProgramInfo:
        """As ``Shim.info``."""
        with self._call():
            answer = await self._control.Info(control_pb2.InfoRequest(), timeout=_QUICK_S)
        return ProgramInfo(answer.version, answer.generation)

    async def reexec(self, program: Sequence[str], generation: int) -> Reexecuted:
        """As ``Shim.reexec``."""
        request = control_pb2.ReexecRequest(program=program, generation=generation)
        with self._call():
            answer = await self._control.Reexec(request, timeout=_SLOW_S)
        return Reexecuted(answer.version, answer.generation, answer.downtime_us)

    async def metrics(self) -> bytes:
        """As ``Shim.metrics``."""
        with self._call():
            request = control_pb2.MetricsRequest()
            return (await self._control.Metrics(request, timeout=_QUICK_S)).text

    def attach(self, requests: AsyncIterator[bytes], *, timeout_s: float | None) -> Attachment:
        """As ``Shim.attach``."""
        method: Any = self._channel.stream_stream(ATTACH_METHOD)  # no serializers: bytes both ways
        with self._call():
            return _Attachment(method(requests, timeout=timeout_s), self._call)

    async def close(self) -> None:
        """As ``Shim.close``: calls under way end with ``Unavailable``."""
        self._closed = True
        await self._channel.close()

    async def _invoke(
        self, method: str, request: Message, answer: type[Answer], timeout_s: float
    ) -> Answer:
        call = self._methods.get(method)
        if call is None:
            call = self._methods[method] = self._channel.unary_unary(
                f"/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
        with self._call():
            found: Answer = await call(request, timeout=timeout_s)
            return found

    @contextmanager
    def _call(self) -> Iterator[None]:
        if self._is_closed():
            raise self._unavailable()
        try:
            with translated():
                yield
        except grpc.aio.UsageError as error:  # the channel was closed while the call began
            raise self._unavailable() from error
        except TheseusError:
            if _is_cancelled():  # the call's end came first; our caller has to see the other
                raise asyncio.CancelledError from None
            raise
        except asyncio.CancelledError:
            if not self._is_closed() or _is_cancelled():
                raise
            raise self._unavailable() from None  # the closed channel cancelled it, not our caller

    def _is_closed(self) -> bool:
        return self._closed

    def _unavailable(self) -> Unavailable:
        return Unavailable(f"the shim of task '{self._id}' went away during the call: try again")


class _Attachment:
    def __init__(self, call: Any, surround: Callable[[], AbstractContextManager[None]]) -> None:
        self._call = call
        self._surround = surround

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._surround():
            async for response in self._call:
                yield response

    def cancel(self) -> None:
        self._call.cancel()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
