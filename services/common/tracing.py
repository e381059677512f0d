"""OpenTelemetry spans over all tiers: off, and free, unless an OTLP endpoint is named.

``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``) turns them on, as it
does for moby and containerd; the other ``OTEL_*`` variables mean what OpenTelemetry's specification
says. Every call that a program serves or makes is a span, and so is every step that :func:`span`
names; who called whom travels in the calls' metadata (W3C Trace Context).

Nothing of OpenTelemetry is imported while it is off: the extra ``otel`` installs it.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Protocol, Self

from services.common import VERSION
from services.common.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_DEFAULT_PROTOCOL = "http/protobuf"
_CREDENTIALS = "_CREDENTIAL_PROVIDER"
_LAST_EXPORT_S = 2.0


class Span(Protocol):
    """A piece of work that is timed inside a ``with`` block; one inside another is its child."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def set(self, **attributes: str | int) -> None:
        """Note facts about it."""
        ...


def requested() -> bool:
    """Whether the environment asks for spans."""
    return os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "otlp" and any(
        os.environ.get(name) for name in _ENDPOINTS
    )


def stays_connected() -> bool:
    """Whether a connection of the recorder's is left after ``flush``, if it records."""
    if not requested():
        return False
    named = any(name.endswith(_CREDENTIALS) for name in os.environ)  # a session that is not ours
    return named or _protocol() != _DEFAULT_PROTOCOL


def prepare() -> None:
    """Import what spans need, for processes that are forked from this one.

    Raises:
        FailedPrecondition: it is not installed.
        InvalidArgument: no such protocol.
    """
    if requested():
        _exporter_class()


def configure(service: str, **attributes: str) -> None:
    """Record spans from now on if the environment asks for it, in a process that forks no more.

    Args:
        service: the tier; the process' recorder, with its thread, is made by the first call.
        attributes: of every span until the next call.

    Raises:
        FailedPrecondition: OpenTelemetry is not installed.
        InvalidArgument: the environment names a protocol that there is not.
    """
    if requested():
        if _process.recorder is None:
            _process.recorder = _Recorder(service)
        _process.recorder.attributes = dict(attributes)


def flush() -> None:
    """Export what is recorded so far, and hang up. Blocks, two seconds at most."""
    if _process.recorder is not None:
        # A collector that does not answer must not hold up whoever ends, or is replaced.
        last = threading.Thread(target=_process.recorder.flush, name="last-spans", daemon=True)
        last.start()
        last.join(_LAST_EXPORT_S)


def span(name: str, **attributes: str | int) -> Span:
    """A step of the work under way."""
    return (
        _NOTHING
        if _process.recorder is None
        else _process.recorder.span(name, "INTERNAL", attributes)
    )


def serving(method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Span:
    """A call that is served: the child of its caller's span."""
    if _process.recorder is None:
        return _NOTHING
    return _process.recorder.span(method[1:], "SERVER", _rpc(method), caller=metadata or ())


def calling(method: str, metadata: Any) -> Any:
    """A call that is made: its context is added to ``metadata``. Returns its done callback."""
    return None if _process.recorder is None else _process.recorder.calling(method, metadata)


class _Nothing:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set(self, **attributes: str | int) -> None:
        pass


class _Recorder:
    """Makes spans and has them exported in the background.

    Attributes:
        attributes: what every span gets, beside its own.
    """

    def __init__(self, service: str) -> None:
        kind, self._session = _exporter_class(), None
        if not stays_connected():
            import requests

            self._session = requests.Session()
        exporter = kind(session=self._session) if self._session is not None else kind()
        from opentelemetry import context, propagate, trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self.attributes: dict[str, str | int] = {}
        self.context, self.trace, self.propagate = context, trace, propagate
        resource = Resource.create({"service.name": service, "service.version": VERSION})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("theseus", VERSION)

    def flush(self) -> None:
        self._provider.force_flush()
        if self._session is not None:
            self._session.close()  # it may be used again: the next export connects anew

    def span(
        self,
        name: str,
        kind: str,
        attributes: dict[str, str | int],
        caller: Iterable[tuple[str, str | bytes]] | None = None,
    ) -> Span:
        parent = None
        if caller is not None:
            carrier = {key: value for key, value in caller if isinstance(value, str)}
            parent = self.propagate.extract(carrier)
        return _Recorded(self, name, kind, attributes, parent)

    def calling(self, method: str, metadata: Any) -> Any:
        made = self.tracer.start_span(
            method[1:],
            kind=self.trace.SpanKind.CLIENT,
            attributes={**self.attributes, **_rpc(method)},
        )
        carrier: dict[str, str] = {}
        self.propagate.inject(carrier, self.trace.set_span_in_context(made))
        for key, value in carrier.items():
            metadata.add(key, value)
        return lambda _: made.end()


class _Recorded:
    def __init__(
        self,
        recorder: _Recorder,
        name: str,
        kind: str,
        attributes: dict[str, str | int],
        parent: Any,
    ) -> None:
        self._recorder = recorder
        self._span = recorder.tracer.start_span(
            name,
            context=parent,
            kind=recorder.trace.SpanKind[kind],
            attributes={**recorder.attributes, **attributes},
        )
        self._token: Any = None

    def __enter__(self) -> Self:
        inside = self._recorder.trace.set_span_in_context(self._span)
        self._token = self._recorder.context.attach(inside)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._span.set_status(
                self._recorder.trace.StatusCode.ERROR, f"{type(error).__name__}: {error}"
            )
        self._span.end()
        self._recorder.context.detach(self._token)

    def set(self, **attributes: str | int) -> None:
        self._span.set_attributes(attributes)


def _rpc(method: str) -> dict[str, str | int]:
    _, service, name = method.split("/", 2)
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


def _protocol() -> str:
    return next(filter(None, map(os.environ.get, _PROTOCOLS)), _DEFAULT_PROTOCOL)


def _exporter_class() -> Any:
    protocol = _protocol()
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

            return over_grpc.OTLPSpanExporter
        if protocol == _DEFAULT_PROTOCOL:
            from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

            return over_http.OTLPSpanExporter
    except ImportError as error:
        raise FailedPrecondition(
            "an OTLP endpoint is set and OpenTelemetry is not installed: install "
            f"'theseus-engine[otel]', or unset {_ENDPOINTS[1]} ({error})"
        ) from error
    raise InvalidArgument(
        f"there is no OTLP protocol '{protocol}': set {_PROTOCOLS[1]} to grpc or http/protobuf"
    )


class _Process:
    """What this process records with, once it does."""

    recorder: _Recorder | None = None


_NOTHING = _Nothing()
_process = _Process()
