"""A tier's gRPC server on its Unix socket, and what surrounds every call on it.

That binds request id and namespace to the log, counts and times the call, and turns
exceptions into statuses (:mod:`services.common.rpc_errors`): our own into theirs, anything else
into INTERNAL with a generic sentence, while the log gets the traceback. A method that streams its
response is an async generator.

It is put around a method once, when that is first called, and not by an interceptor, which grpc.aio
would have do it for every call.
"""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import aclosing
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Protocol, Self

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.common import errors, tracing
from services.common.client import MESSAGE_LIMIT_BYTES, NAMESPACE_KEY
from services.common.frozen import frozen
from services.common.log import REQUEST_ID_KEY, new_request_id, request_id
from services.common.rpc_errors import to_status
from services.common.sockets import Place, check_socket_path, let_group_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from google.protobuf.descriptor import ServiceDescriptor

    from services.common.late_services import LateServices
    from services.common.metrics import CallLabels


log = structlog.get_logger(__name__)

_NAMESPACE = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_NAMESPACE_MAX_LENGTH = 76
_GO_NAMES = {
    code: "OK" if code is grpc.StatusCode.OK else code.name.title().replace("_", "")
    for code in grpc.StatusCode
}
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


@frozen
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

Metadata = tuple[tuple[str, str | bytes], ...]
"""What a request carries beside its message."""


class CallMetrics(Protocol):
    """Counts and times the calls that a server handles."""

    def begin(self, labels: CallLabels) -> None:
        """Count the start of a call."""
        ...

    def end(self, labels: CallLabels, code: str, took_s: float) -> None:
        """Count the end of a call; ``code`` is spelt as in Go: ``NotFound``."""
        ...


class RpcServer:
    """Serves ``services``, those that are ``late``, grpc.health.v1 and reflection on ``socket``.

    The socket appears by a rename over whatever is there, so that during a replacement there is
    always one to connect to: mode 0660, group ``theseus`` where that exists. A tier's own
    ``interceptors`` see a call before it is counted; ``bind`` is called with the metadata of each
    call, and a context variable that it sets is the handler's.

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
        late: Sequence[LateServices] = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        bind: Callable[[Metadata], None] | None = None,
    ) -> None:
        self._interceptors = interceptors
        self._tier = tier
        self._place = Place(socket)
        self._services = services
        self._late = late
        self._methods = Methods(metrics, bind)
        self._reflection = reflection
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        check_socket_path(self._place.new)

    async def start(self) -> None:
        """Bind and serve; every service reports SERVING."""
        self._server = grpc.aio.server(interceptors=self._interceptors, options=SERVER_OPTIONS)
        names = [service.descriptor.full_name for service in self._services]
        for service in self._services:
            service.add(service.servicer, self._methods)
        for late in self._late:
            self._methods.add_late(late)
            names += late.names
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._methods)
        if self._reflection:
            _LateReflection([*names, health.SERVICE_NAME], self._methods).add()
        self._server.add_generic_rpc_handlers((self._methods,))
        for name in ["", *names]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._bind(self._server)

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, take no more calls, give those under way ``grace_s`` seconds."""
        if self._server is None:
            return
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        self._place.leave()

    async def _bind(self, server: grpc.aio.Server) -> None:
        new = self._place.new
        new.unlink(missing_ok=True)
        if server.add_insecure_port(f"unix:{new}") == 0:
            raise errors.FailedPrecondition(f"cannot bind the socket {new}: see the log above")
        await server.start()
        new.chmod(0o660)
        let_group_in(new)
        self._place.take()


class Methods(grpc.GenericRpcHandler):
    """The methods of a server; generated code adds to it as it would to a server.

    To grpc.aio they are one generic handler. Of methods that are registered with it, it waits for
    the next call of each at the same time, so that a call costs the more the more there are: 0.2 ms
    with 90 of them.
    """

    def __init__(
        self, metrics: CallMetrics, bind: Callable[[Metadata], None] | None = None
    ) -> None:
        self._metrics = metrics
        self._bind = bind
        self._handlers: dict[str, Any] = {}
        self._uncalled: dict[str, Service] = {}
        self._late: dict[str, LateServices] = {}
        self._surrounded: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        """Their full names: ``/service/method``."""
        return iter(self._handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """As a server's."""
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = handler

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """As a server's; generated code adds the same methods as registered ones."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of a method."""
        handler: grpc.RpcMethodHandler[Any, Any] | None = self.find(handler_call_details.method)
        return handler

    def find(self, name: str) -> Any:
        """The handler of a method, given its full name; None if there is none."""
        found = self._surrounded.get(name)
        if found is None:
            service = name.split("/", 2)[1]
            if (uncalled := self._uncalled.pop(service, None)) is not None:
                uncalled.add(uncalled.servicer, self)
            if (handler := self._handlers.get(name)) is not None:
                found = self._surrounded[name] = self._surround(name, handler)
            elif (late := self._late.get(service)) is not None and not late.made:
                found = late.handler(name, self)
        return found

    def add_when_called(self, service: Service) -> None:
        """Add a service with the first call to it: most of a shim's never see one."""
        self._uncalled[service.descriptor.full_name] = service

    def add_late(self, services: LateServices) -> None:
        """Have calls of services that are not there yet wait for them."""
        self._late.update(dict.fromkeys(services.names, services))

    async def load(self) -> None:
        """Make what is late."""
        for services in set(self._late.values()):
            await services.load(self)

    def _surround(self, name: str, handler: Any) -> Any:
        call = _Call(self._metrics, name, handler, self._bind)
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


class _LateReflection:
    """Server reflection that is imported when it is asked for: a shim never is, as a rule."""

    def __init__(self, names: Sequence[str], methods: Methods) -> None:
        self._names = names
        self._methods = methods
        self._servicer: Any = None

    def add(self) -> None:
        """As generated code would."""
        handler: Any = grpc.stream_stream_rpc_method_handler(
            self._answer,
            request_deserializer=self._parse,
            response_serializer=lambda response: response.SerializeToString(),
        )
        self._methods.add_registered_method_handlers(_REFLECTION, {"ServerReflectionInfo": handler})

    @staticmethod
    def _parse(request: bytes) -> Any:
        from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

        return ServerReflectionRequest.FromString(request)

    async def _answer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        from grpc_reflection.v1alpha import reflection
        from grpc_reflection.v1alpha._async import ReflectionServicer

        if self._servicer is None:
            await self._methods.load()  # it looks for their descriptors
            self._servicer = ReflectionServicer([*self._names, reflection.SERVICE_NAME])
        async for response in self._servicer.ServerReflectionInfo(requests, context):
            yield response


def metadata_value(context: grpc.aio.ServicerContext[Any, Any], key: str) -> str:
    """The last value of a key of the request's metadata, or empty."""
    return _last(context.invocation_metadata() or (), key)


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


def _last(metadata: Any, key: str) -> str:
    found = ""
    for name, value in metadata:
        if name == key:
            found = value.decode(errors="replace") if isinstance(value, bytes) else value
    return found


class _Call:
    """One method's handler with what surrounds it."""

    def __init__(
        self,
        metrics: CallMetrics,
        method: str,
        handler: Any,
        bind: Callable[[Metadata], None] | None,
    ) -> None:
        self.metrics = metrics
        self.method = method
        self.bind = bind
        _, service, name = method.split("/", 2)
        kinds = ("unary", "server_stream"), ("client_stream", "bidi_stream")
        kind = kinds[bool(handler.request_streaming)][bool(handler.response_streaming)]
        self.labels = (kind, service, name)
        self._behaviour: Any = (
            handler.stream_stream
            or handler.unary_stream
            or handler.stream_unary
            or handler.unary_unary
        )

    async def unary(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with _Served(self, context) as served:
            try:
                return await self._behaviour(request, context)
            except Exception as error:
                served.code = self._fail(context, error)

    async def stream(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        with _Served(self, context) as served:
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
                served.code = self._fail(context, error)

    def _fail(
        self, context: grpc.aio.ServicerContext[Any, Any], error: Exception
    ) -> grpc.StatusCode:
        """Set the status that ``error`` stands for; the handler then returns without a message."""
        if isinstance(error, errors.TheseusError):
            code, message, trailers = to_status(error)
            log.info("call failed", method=self.method, code=code.name, error=message)
        elif isinstance(error, TimeoutError):
            code, message, trailers = (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the work did not end within its time limit",
                (),
            )
            log.warning("call timed out", method=self.method, exc_info=error)
        else:
            code, message, trailers = (
                grpc.StatusCode.INTERNAL,
                f"internal error in {self.method}: see the log for request {request_id.get()}",
                (),
            )
            log.error("call broke", method=self.method, exc_info=error)
        context.set_code(code)
        context.set_details(message)
        if trailers:
            context.set_trailing_metadata(trailers)
        return code


class _Served:
    """One call that is being served, from its metadata to its count."""

    __slots__ = ("_began", "_call", "_span", "code")

    def __init__(self, call: _Call, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.code = grpc.StatusCode.OK
        self._call = call
        metadata: Any = context.invocation_metadata() or ()
        identity, namespace = _last(metadata, REQUEST_ID_KEY), _last(metadata, NAMESPACE_KEY)
        request_id.set(identity or new_request_id())
        if namespace:
            structlog.contextvars.bind_contextvars(namespace=namespace)
        if call.bind is not None:
            call.bind(metadata)
        self._span = tracing.serving(call.method, metadata)

    def __enter__(self) -> Self:
        self._call.metrics.begin(self._call.labels)
        self._span.__enter__()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        took_s = time.perf_counter() - self._began
        if isinstance(error, asyncio.CancelledError):
            self.code = grpc.StatusCode.CANCELLED
        self._span.set(request_id=request_id.get(), code=self.code.name)
        self._span.__exit__(kind, error, traceback)
        self._call.metrics.end(self._call.labels, _GO_NAMES[self.code], took_s)
        log.debug(
            "call handled",
            method=self._call.method,
            code=self.code.name,
            seconds=round(took_s, 6),
        )
