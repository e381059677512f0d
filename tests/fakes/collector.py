"""An OTLP collector that keeps the spans it is sent."""

from __future__ import annotations

import gzip
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Received:
    """A span as it came over the wire."""

    service: str
    name: str
    kind: int
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    failed: bool
    attributes: dict[str, str]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Serves on loopback, at ``endpoint``."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.endpoint = ""
        self._changed = Condition()

    def Export(self, request, context):
        with self._changed:
            for resource in request.resource_spans:
                facts = _attributes(resource.resource)
                for scope in resource.scope_spans:
                    self.spans += [_received(facts["service.name"], span) for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def one(self, name: str, service: str = "", *, limit_s: float = 20) -> Received:
        """The first span of a name, once it has come."""

        def found():
            wanted = (s for s in self.spans if s.name == name and service in ("", s.service))
            return next(wanted, None)

        with self._changed:
            assert self._changed.wait_for(found, limit_s), (
                f"no span {name}: {sorted({span.name for span in self.spans})}"
            )
            return found()

    def ancestors(self, span: Received) -> list[str]:
        """Names of the spans above one, nearest first."""
        by_id = {other.span_id: other for other in self.spans}
        names = []
        while span.parent_id in by_id:
            span = by_id[span.parent_id]
            names.append(span.name)
        return names


@contextmanager
def collecting(protocol="grpc"):
    """A collector for the block, by OTLP's ``grpc`` or ``http/protobuf``."""
    collector = Collector()
    with _serving_grpc(collector) if protocol == "grpc" else _serving_http(collector):
        yield collector


@contextmanager
def _serving_grpc(collector):
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield
    finally:
        server.stop(0).wait()


@contextmanager
def _serving_http(collector):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay, if the client does not want it otherwise

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            kind = trace_service_pb2.ExportTraceServiceRequest
            answer = collector.Export(kind.FromString(body), None).SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector.endpoint = f"http://127.0.0.1:{server.server_port}"
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            yield
        finally:
            server.shutdown()
            serving.join()


def _received(service, span):
    return Received(
        service,
        span.name,
        span.kind,
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.status.code == 2,
        _attributes(span),
    )


def _attributes(message):
    return {
        pair.key: str(getattr(pair.value, pair.value.WhichOneof("value")))
        for pair in message.attributes
    }
