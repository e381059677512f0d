"""A shim that others wrote, over ttrpc or gRPC: implements ``services.containerd.tasks.shim.Shim``.

It has the task API, perhaps that of sandboxes, and nothing else: no streams by offset, no metrics
of its own, and it is not re-executed. Its address says how it is reached:
``ttrpc+unix://PATH?version=2``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from google.protobuf.message import DecodeError

from services.common.client import connect
from services.common.errors import DeadlineExceeded, InvalidArgument, Unavailable, Unimplemented
from services.common.rpc_errors import error_of, translated
from services.common.ttrpc.client import CallFailed, Reconnecting, TtrpcClient
from services.common.ttrpc.frames import MessageTooLarge
from services.containerd.clients.sandbox_api import SandboxApiClient
from services.containerd.clients.shim import ShimClient

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

    from services.common.message_stream import MessageStream
    from services.containerd.clients.task_api import Answer
    from services.containerd.tasks.line import Way
    from services.containerd.tasks.sandbox import SandboxShim
    from services.containerd.tasks.shim import (
        ProgramInfo,
        Reexecuted,
        Shim,
        ShimAddress,
        ShimRequest,
    )

_NAMESPACE_KEY = "containerd-namespace-ttrpc"
_ADDRESS = re.compile(r"(ttrpc|grpc)\+unix://(/[^?]*)\?version=([23])")


class ForeignShim(SandboxApiClient):
    """One shim, on one connection, which is made when it is first used, and anew when it broke.

    Args:
        namespace: containerd's.
        container_id: whose task the shim runs.
        address: see the module.
    """

    def __init__(self, *, namespace: str, container_id: str, address: str) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise InvalidArgument(
                f"the shim of task '{container_id}' is at '{address}': only ttrpc and gRPC over "
                "a Unix socket, in version 2 or 3, can be spoken to"
            )
        protocol, path, version = match.groups()
        super().__init__(container_id, version)
        self._namespace = namespace
        self._path = Path(path)
        self._channel = connect(self._path, namespace=namespace) if protocol == "grpc" else None
        self._connection = Reconnecting(self._path)
        self._closed = False

    async def host(self, request: ShimRequest) -> ShimAddress:
        """As ``Shim.host``; refused: its program finds the shim of a group."""
        self._refuse("takes another task in")

    async def leave(self, *, now: bool = False) -> None:
        """As ``Shim.leave``: it knows itself that it has others."""
        await self.shutdown()

    async def info(self) -> ProgramInfo:
        """As ``Shim.info``; refused."""
        self._refuse("tells of itself")

    async def reexec(self, program: Sequence[str], generation: int) -> Reexecuted:
        """As ``Shim.reexec``; refused."""
        self._refuse("is upgraded in place")

    async def metrics(self) -> bytes:
        """As ``Shim.metrics``: it has none."""
        return b""

    async def attach(self) -> MessageStream:
        """As ``Shim.attach``; refused."""
        self._refuse("keeps output to be attached to")

    async def close(self) -> None:
        """As ``Shim.close``."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()
        self._connection.close()

    async def _invoke(
        self, method: str, request: Message, answer: type[Answer], timeout_s: float
    ) -> Answer:
        if self._closed:
            raise self._unavailable("it was given up")
        if self._channel is not None:
            call: Any = self._channel.unary_unary(
                f"/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            with translated():
                found: Answer = await call(request, timeout=timeout_s)
                return found
        service, _, name = method.partition("/")
        try:
            client = await self._connection.client()
            data = await client.call(
                service,
                name,
                request.SerializeToString(),
                timeout_s=timeout_s,
                metadata=[(_NAMESPACE_KEY, self._namespace)],
            )
            return answer.FromString(data)
        except CallFailed as error:
            raise error_of(error.status) from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"the shim of task '{self._id}' did not answer {method} within {timeout_s:g} s"
            ) from None
        except OSError as error:
            raise self._unavailable(str(error)) from error
        except MessageTooLarge as error:
            raise InvalidArgument(str(error)) from error
        except DecodeError as error:
            raise self._unavailable("its answer cannot be decoded") from error

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(f"the shim of task '{self._id}' cannot be reached: {reason}")

    def _refuse(self, what: str) -> NoReturn:
        raise Unimplemented(
            f"task '{self._id}' is run by a shim that others wrote: only one of Theseus' {what}"
        )


def connect_shim(
    *, namespace: str, container_id: str, address: str, way: Way | None = None
) -> Shim:
    """A client of a shim, ours or another, as its address says; see ``ShimConnector``."""
    if not address.startswith("unix://"):
        return ForeignShim(namespace=namespace, container_id=container_id, address=address)
    assert way is None or isinstance(way, TtrpcClient), "it was dialled by dial_shim"
    return ShimClient(namespace=namespace, container_id=container_id, address=address, way=way)


def has_sandboxes(shim: Shim) -> SandboxShim | None:
    """A shim by its sandbox API; None for one that is gone."""
    return shim if isinstance(shim, SandboxApiClient) else None
