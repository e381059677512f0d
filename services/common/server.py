"""A tier's gRPC server on its Unix socket, and the one interceptor that every call passes.

The interceptor binds request id and namespace to the log, counts and times the call, and turns
exceptions into statuses (:mod:`services.common.rpc_errors`): our own into theirs, anything else
into INTERNAL with a generic sentence, while the log gets the traceback. A method that streams its
response is an async generator.
"""

from __future__ import annotations

import asyncio
import grp
import os
import re
import time
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common import errors, tracing
from services.common.client import MESSAGE_LIMIT_BYTES, NAMESPACE_KEY
from services.common.log import REQUEST_ID_KEY, new_request_id, request_id
from services.common.rpc_errors import to_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from google.protobuf.descriptor import ServiceDescriptor


log = structlog.get_logger(__name__)

SOCKET_GROUP = "theseus"
UNIX_PATH_MAX_BYTES = 107
_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_NAMESPACE_MAX_LENGTH = 76
_REFLECTION_METHOD = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@dataclass(frozen=True, slots=True)
class Service:
    """One service of a server.

    Attributes:
        add: the generated ``add_<Name>Servicer_to_server``.
        servicer: its implementation.
        descriptor: for reflection and health.
    """

    add: Callable[[Any, Any], None]
    servicer: object
    descriptor: ServiceDescriptor


SERVER_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.so_reuseport", 0),
)

CallLabels = tuple[str, str, str]
"""Kind of a call (``unary``, ``bidi_stream`` and so on), service, method."""


class CallMetrics(Protocol):
    """Counts and times the calls that a server handles."""

    def begin(self, labels: CallLabels) -> None:
        """Count the start of a call."""
        ...

    def end(self, labels: CallLabels, code: str, took_s: float) -> None:
        """Count the end of a call; ``code`` is spelt as in Go: ``NotFound``."""
        ...


class RpcServer:
    """Serves ``services``, grpc.health.v1 and reflection on ``socket``.

    The socket appears by a rename over whatever is there, so that during a replacement there is
    always one to connect to: mode 0660, group ``theseus`` where that exists. A tier's own
    ``interceptors`` see a call after the common one; a context variable that they set is the
    handler's.

    Raises:
        InvalidArgument: the path is longer than a socket's name may be.
    """

    def __init__(
        self,
        *,
        tier: str,
        socket: Path,
        services: Sequence[Service],
        metrics: CallMetrics,
        reflection: bool = True,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        make_server: Callable[..., Any] = grpc.aio.server,
    ) -> None:
        self._make_server = make_server
        self._interceptors = interceptors
        self._tier = tier
        self._socket = socket
        self._services = services
        self._metrics = metrics
        self._reflection = reflection
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._inode = 0
        check_socket_path(socket.with_name(f"{socket.name}.new"))

    async def start(self) -> None:
        """Bind and serve; every service reports SERVING."""
        self._server = self._make_server(
            interceptors=[_Interceptor(self._metrics), *self._interceptors],
            options=SERVER_OPTIONS,
        )
        names = [service.descriptor.full_name for service in self._services]
        for service in self._services:
            service.add(service.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self._reflection:
            self._server.add_generic_rpc_handlers((LateReflection([*names, health.SERVICE_NAME]),))
        for name in ["", *names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._bind(self._server)

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, take no more calls, give those under way ``grace_s`` seconds."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        # A successor may have put its own socket in this place.
        if self._socket.exists() and self._socket.stat().st_ino == self._inode:
            self._socket.unlink()

    async def _bind(self, server: grpc.aio.Server) -> None:
        new = self._socket.with_name(f"{self._socket.name}.new")
        new.unlink(missing_ok=True)
        if server.add_insecure_port(f"unix:{new}") == 0:
            raise errors.FailedPrecondition(f"cannot bind the socket {new}: see the log above")
        await server.start()
        new.chmod(0o660)
        group = socket_group()
        if group is not None:
            os.chown(new, -1, group)
        self._inode = new.stat().st_ino
        new.rename(self._socket)


class LateReflection(grpc.GenericRpcHandler):
    """Server reflection that is imported when it is asked for: a shim never is, as a rule."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._behaviour: Any = None

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of the one method of reflection."""
        if handler_call_details.method != _REFLECTION_METHOD:
            return None
        from grpc_reflection.v1alpha import reflection
        from grpc_reflection.v1alpha._async import ReflectionServicer
        from grpc_reflection.v1alpha.reflection_pb2 import (
            ServerReflectionRequest,
            ServerReflectionResponse,
        )

        if self._behaviour is None:
            servicer = ReflectionServicer([*self._names, reflection.SERVICE_NAME])
            self._behaviour = servicer.ServerReflectionInfo
        return grpc.stream_stream_rpc_method_handler(
            self._behaviour,
            request_deserializer=ServerReflectionRequest.FromString,
            response_serializer=ServerReflectionResponse.SerializeToString,
        )


@cache
def socket_group() -> int | None:
    """Id of the group that may connect; None where it does not exist. Asked once: it is slow."""
    try:
        return grp.getgrnam(SOCKET_GROUP).gr_gid
    except KeyError:
        log.debug("socket group does not exist", group=SOCKET_GROUP)
        return None


def check_socket_path(path: Path) -> None:
    """Refuse a path that does not fit a Unix socket's address (unix(7)).

    Raises:
        InvalidArgument: it is longer than 107 bytes.
    """
    length = len(os.fsencode(path))
    if length > UNIX_PATH_MAX_BYTES:
        raise errors.InvalidArgument(
            f"socket path {path} has {length} bytes, a Unix socket's may have at most "
            f"{UNIX_PATH_MAX_BYTES}: choose a shorter state directory"
        )


def metadata_value(context: grpc.aio.ServicerContext[Any, Any], key: str) -> str:
    """The last value of a key of the request's metadata, or empty."""
    found = ""
    for name, value in context.invocation_metadata() or ():
        if name == key:
            found = value.decode(errors="replace") if isinstance(value, bytes) else value
    return found


def request_namespace(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """containerd's namespace that the request names.

    Raises:
        FailedPrecondition: it names none (upstream's code and words).
        InvalidArgument: that can be no name: it would have to be safe as a directory's.
    """
    namespace = metadata_value(context, NAMESPACE_KEY)
    if not namespace:
        raise errors.FailedPrecondition("namespace is required: set containerd-namespace metadata")
    if len(namespace) > _NAMESPACE_MAX_LENGTH or not _NAMESPACE.fullmatch(namespace):
        raise errors.InvalidArgument(
            f"namespace {namespace[:_NAMESPACE_MAX_LENGTH]!r} is malformed: at most "
            f"{_NAMESPACE_MAX_LENGTH} letters and digits, with single '.', '_' or '-' between them",
            field=NAMESPACE_KEY,
        )
    return namespace


class _Interceptor(grpc.aio.ServerInterceptor):
    def __init__(self, metrics: CallMetrics) -> None:
        self._metrics = metrics

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        call = _Call(self._metrics, handler_call_details.method, handler)
        if handler.response_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            behaviour: Any = call.stream
        else:
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            behaviour = call.unary
        return make(
            behaviour,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


class _Call:
    """One method's handler with what surrounds it."""

    def __init__(self, metrics: CallMetrics, method: str, handler: Any) -> None:
        self._metrics = metrics
        self._method = method
        _, service, name = method.split("/", 2)
        kinds = ("unary", "server_stream"), ("client_stream", "bidi_stream")
        kind = kinds[bool(handler.request_streaming)][bool(handler.response_streaming)]
        self._labels = (kind, service, name)
        self._behaviour: Any = (
            handler.stream_stream
            or handler.unary_stream
            or handler.stream_unary
            or handler.unary_unary
        )

    async def unary(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with self._surround(context) as outcome:
            try:
                return await self._behaviour(request, context)
            except Exception as error:
                outcome.code = await self._fail(context, error)

    async def stream(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        with self._surround(context) as outcome:
            try:
                answering = self._behaviour(request, context)
                if isawaitable(answering):  # it writes for itself, as grpc_health does
                    await answering
                    return
                # Written here, not yielded: a generator that grpc.aio drops when the client is gone
                # would be closed only by the garbage collector.
                async with aclosing(answering) as responses:
                    async for response in responses:
                        await context.write(response)
            except Exception as error:
                outcome.code = await self._fail(context, error)

    @contextmanager
    def _surround(self, context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[_Outcome]:
        outcome = _Outcome()
        identity = metadata_value(context, REQUEST_ID_KEY) or new_request_id()
        request_id.set(identity)
        structlog.contextvars.bind_contextvars(request_id=identity)
        if namespace := metadata_value(context, NAMESPACE_KEY):
            structlog.contextvars.bind_contextvars(namespace=namespace)
        self._metrics.begin(self._labels)
        began = time.perf_counter()
        try:
            with tracing.serving(self._method, context.invocation_metadata()) as span:
                yield outcome
                span.set(request_id=identity, code=outcome.code.name)
        except asyncio.CancelledError:
            outcome.code = grpc.StatusCode.CANCELLED
            raise
        finally:
            took_s = time.perf_counter() - began
            code = outcome.code
            name = "OK" if code is grpc.StatusCode.OK else code.name.title().replace("_", "")
            self._metrics.end(self._labels, name, took_s)
            log.debug("call handled", method=self._method, code=code.name, seconds=round(took_s, 6))

    async def _fail(
        self, context: grpc.aio.ServicerContext[Any, Any], error: Exception
    ) -> grpc.StatusCode:
        """Set the status that ``error`` stands for; the handler then returns without a message."""
        if isinstance(error, errors.TheseusError):
            code, message, trailers = to_status(error)
            log.info("call failed", method=self._method, code=code.name, error=message)
        elif isinstance(error, TimeoutError):
            code, message, trailers = (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the work did not end within its time limit",
                (),
            )
            log.warning("call timed out", method=self._method, exc_info=error)
        else:
            code, message, trailers = (
                grpc.StatusCode.INTERNAL,
                f"internal error in {self._method}: see the log for request {request_id.get()}",
                (),
            )
            log.error("call broke", method=self._method, exc_info=error)
        context.set_code(code)
        context.set_details(message)
        if trailers:
            context.set_trailing_metadata(trailers)
        return code


@dataclass(slots=True)
class _Outcome:
    code: grpc.StatusCode = grpc.StatusCode.OK
