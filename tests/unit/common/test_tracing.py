"""Spans: nothing at all while they are off; parents, failures and calls while they are on."""

import subprocess
import sys

import grpc
import pytest

from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from services.common import tracing
from services.common.client import connect
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.metrics import ServerMetrics
from services.common.server import RpcServer, Service
from tests.fakes.collector import collecting

SERVICE = "containerd.services.namespaces.v1.Namespaces"


@pytest.fixture
def collector(monkeypatch):
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # only what is flushed comes
        monkeypatch.setattr(tracing, "_process", tracing._Process())
        tracing.configure("program", fact="known")
        yield collector


class Namespaces(namespace_pb2_grpc.NamespacesServicer):
    async def Get(self, request, context):
        with tracing.span("inside"):
            if request.name == "none":
                raise NotFound("there is no such namespace")
        return namespace_pb2.GetNamespaceResponse()

    async def Create(self, request, context):
        raise RuntimeError("a fault")


@pytest.fixture
async def stub(tmp_path):
    server = RpcServer(
        tier="t",
        socket=tmp_path / "t.sock",
        services=[
            Service(
                namespace_pb2_grpc.add_NamespacesServicer_to_server,
                Namespaces(),
                namespace_pb2.DESCRIPTOR.services_by_name["Namespaces"],
            )
        ],
        metrics=ServerMetrics(),
    )
    await server.start()
    async with connect(tmp_path / "t.sock") as channel:
        yield namespace_pb2_grpc.NamespacesStub(channel)
    await server.stop(0)


def test_nothing_is_imported_or_made_while_it_is_off(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import sys; from services.common import tracing; tracing.prepare();"
        "tracing.configure('x'); assert tracing.span('a') is tracing.span('b', c=1);"
        "assert tracing.calling('/a/b', None) is None; tracing.flush();"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


async def test_a_call_is_one_trace_on_both_sides(collector, stub):
    with tracing.span("outside", answer=42):
        await stub.Get(namespace_pb2.GetNamespaceRequest(name="n"), timeout=10)
    tracing.flush()
    inside = collector.one("inside")
    assert collector.ancestors(inside) == [f"{SERVICE}/Get", f"{SERVICE}/Get", "outside"]
    assert len({span.trace_id for span in collector.spans}) == 1
    served, made = (s for s in collector.spans if s.name == f"{SERVICE}/Get")
    assert {served.kind, made.kind} == {2, 3}  # server, client
    assert served.attributes["code"] == "OK"
    assert len(served.attributes["request_id"]) == 16
    assert collector.one("outside").attributes == {"answer": "42", "fact": "known"}
    assert {span.service for span in collector.spans} == {"program"}


async def test_failures_are_marked(collector, stub):
    for call in (
        stub.Get(namespace_pb2.GetNamespaceRequest(name="none"), timeout=10),
        stub.Create(namespace_pb2.CreateNamespaceRequest(), timeout=10),
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await call
    tracing.flush()
    assert collector.one("inside").failed
    codes = {s.name: s.attributes["code"] for s in collector.spans if s.kind == 2}
    assert codes == {f"{SERVICE}/Get": "NOT_FOUND", f"{SERVICE}/Create": "INTERNAL"}


def test_a_collector_that_does_not_answer_holds_nobody_up(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(tracing, "_process", tracing._Process())
    monkeypatch.setattr(tracing, "_LAST_EXPORT_S", 0.05)
    tracing.configure("program")
    with tracing.span("lost"):
        pass
    tracing.flush()


def test_wrong_settings_are_told_in_words(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon")
    with pytest.raises(InvalidArgument, match=r"carrier-pigeon.*grpc or http/protobuf"):
        tracing.prepare()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc", None)
    with pytest.raises(FailedPrecondition, match=r"install 'theseus-engine\[otel\]'"):
        tracing.prepare()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    tracing.prepare()
