"""The plumbing that every tier shares, over a real socket: errors both ways, ids, metrics."""

import asyncio
import stat
from contextvars import ContextVar

import grpc
import pytest
import structlog
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.containerd.services.namespaces.v1 import namespace_pb2, namespace_pb2_grpc
from protos.theseus.journal.v1 import journal_pb2, journal_pb2_grpc
from services.common import errors
from services.common.client import connect
from services.common.late_services import LateServices
from services.common.log import request_id
from services.common.metrics import ServerMetrics
from services.common.metrics_endpoint import MetricsEndpoint
from services.common.rpc_errors import code_of, translated
from services.common.server import RpcServer, Service, request_namespace

ALL_ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.TheseusError)
    and kind is not errors.TheseusError
]


class Namespaces(namespace_pb2_grpc.NamespacesServicer):
    """Get fails as told; List answers with what the call carried."""

    def __init__(self):
        self.failure: Exception | None = None

    async def Get(self, request, context):
        if self.failure is not None:
            raise self.failure
        return namespace_pb2.GetNamespaceResponse()

    async def List(self, request, context):
        names = [request_id.get(), request_namespace(context)]
        return namespace_pb2.ListNamespacesResponse(
            namespaces=[namespace_pb2.Namespace(name=name) for name in names]
        )


class Journal(journal_pb2_grpc.JournalServicer):
    async def Read(self, request, context):
        for seq in range(3):
            yield journal_pb2.ReadResponse(next_seq=seq)
        raise errors.OutOfRange("events before 7 were truncated, first is 7")


def late(*services):
    async def make():
        await asyncio.sleep(0)
        return services

    return LateServices([service.descriptor.full_name for service in services], make)


@pytest.fixture(params=["at once", "late"])
async def server(tmp_path, request):
    servicer = Namespaces()
    metrics = ServerMetrics()
    services = [
        Service(
            namespace_pb2_grpc.add_NamespacesServicer_to_server,
            servicer,
            namespace_pb2.DESCRIPTOR.services_by_name["Namespaces"],
        ),
        Service(
            journal_pb2_grpc.add_JournalServicer_to_server,
            Journal(),
            journal_pb2.DESCRIPTOR.services_by_name["Journal"],
        ),
    ]
    is_late = request.param == "late"
    rpc = RpcServer(
        tier="test",
        socket=tmp_path / "t.sock",
        metrics=metrics,
        services=[] if is_late else services,
        late=[late(*services)] if is_late else [],
    )
    await rpc.start()
    yield tmp_path / "t.sock", servicer, metrics
    await rpc.stop(0)
    structlog.contextvars.clear_contextvars()


@pytest.mark.parametrize("kind", ALL_ERRORS)
async def test_an_error_is_the_same_on_both_sides_of_the_wire(server, kind):
    socket, servicer, _ = server
    servicer.failure = kind(
        "image 'ü' is not there",
        field="image",
        resource=("image", "ü"),
        reason="WHY",
        retry_after_s=1.5,
    )
    async with connect(socket) as channel:
        stub = namespace_pb2_grpc.NamespacesStub(channel)
        with pytest.raises(kind) as caught, translated():
            await stub.Get(namespace_pb2.GetNamespaceRequest(), timeout=10)
    assert vars(caught.value) == vars(servicer.failure)


def test_a_domain_error_has_the_code_of_its_kind():
    class SnapshotInUse(errors.FailedPrecondition):
        pass

    assert code_of(SnapshotInUse("x")) is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_fault_of_ours_reaches_the_client_without_its_text(server):
    socket, servicer, _ = server
    servicer.failure = ZeroDivisionError("secret")
    async with connect(socket) as channel:
        stub = namespace_pb2_grpc.NamespacesStub(channel)
        with pytest.raises(errors.Internal) as caught, translated():
            await stub.Get(namespace_pb2.GetNamespaceRequest(), timeout=10)
    assert "secret" not in caught.value.message
    assert "see the log for request" in caught.value.message


async def test_a_connection_that_breaks_under_a_write_is_unavailable(server):
    socket, _, _ = server

    class Breaking:
        """grpc's call whose transport refuses what is written, as when its server was killed."""

        def __init__(self, call):
            self._call = call

        def __getattr__(self, name):
            return getattr(self._call, name)

        async def send_serialized_message(self, message):
            raise cygrpc.InternalError("Failed execute_batch")

    async with connect(socket) as channel:
        call = channel.stream_stream("/theseus.journal.v1.Journal/Read")(timeout=10)
        call._cython_call = Breaking(call._cython_call)
        with pytest.raises(errors.Unavailable), translated():
            await call.write(b"hello")


async def test_request_id_and_namespace_travel_with_the_call(server):
    socket, _, _ = server
    request_id.set("0123456789abcdef")
    async with connect(socket, namespace="ns1") as channel:
        stub = namespace_pb2_grpc.NamespacesStub(channel)
        reply = await stub.List(namespace_pb2.ListNamespacesRequest(), timeout=10)
    assert [entry.name for entry in reply.namespaces] == ["0123456789abcdef", "ns1"]


async def test_a_missing_namespace_is_a_failed_precondition(server):
    socket, _, _ = server
    async with connect(socket) as channel:
        stub = namespace_pb2_grpc.NamespacesStub(channel)
        with pytest.raises(errors.FailedPrecondition, match="namespace is required"), translated():
            await stub.List(namespace_pb2.ListNamespacesRequest(), timeout=10)


async def test_a_stream_delivers_what_came_before_its_error(server):
    socket, _, _ = server
    seen = []
    async with connect(socket) as channel:
        stub = journal_pb2_grpc.JournalStub(channel)
        with pytest.raises(errors.OutOfRange, match="first is 7"), translated():
            async for response in stub.Read(journal_pb2.ReadRequest(), timeout=10):
                seen.append(response.next_seq)
    assert seen == [0, 1, 2]


async def test_calls_are_counted_by_code(server):
    socket, servicer, metrics = server
    servicer.failure = errors.NotFound("no")
    async with connect(socket) as channel:
        stub = namespace_pb2_grpc.NamespacesStub(channel)
        with pytest.raises(errors.NotFound), translated():
            await stub.Get(namespace_pb2.GetNamespaceRequest(), timeout=10)
    page = "".join(metrics.lines())
    service = 'grpc_service="containerd.services.namespaces.v1.Namespaces",grpc_type="unary"'
    assert f'grpc_server_started_total{{grpc_method="Get",{service}}} 1.0' in page
    assert (
        'grpc_server_handled_total{grpc_code="NotFound",grpc_method="Get",' + service + "} 1.0"
    ) in page


async def test_health_is_served_and_the_socket_is_private(server):
    socket, _, _ = server
    assert stat.S_IMODE(socket.stat().st_mode) == 0o660
    async with connect(socket) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(
            health_pb2.HealthCheckRequest(service="theseus.journal.v1.Journal"), timeout=10
        )
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_call_that_nobody_serves_is_unimplemented_and_not_counted(server):
    socket, _, metrics = server
    async with connect(socket) as channel:
        method = channel.unary_unary("/containerd.services.namespaces.v1.Namespaces/Rename")
        with pytest.raises(errors.Unimplemented), translated():
            await method(b"", timeout=10)
    assert "Rename" not in "".join(metrics.lines())


async def test_what_a_tier_binds_is_the_handlers_and_no_other_calls(tmp_path):
    lease = ContextVar("lease", default="none")

    class Telling(Namespaces):
        async def List(self, request, context):
            return namespace_pb2.ListNamespacesResponse(
                namespaces=[namespace_pb2.Namespace(name=lease.get())]
            )

    def bind(metadata):
        for key, value in metadata:
            if key == "lease":
                lease.set(value)

    rpc = RpcServer(
        tier="test",
        socket=tmp_path / "t.sock",
        metrics=ServerMetrics(),
        services=[
            Service(
                namespace_pb2_grpc.add_NamespacesServicer_to_server,
                Telling(),
                namespace_pb2.DESCRIPTOR.services_by_name["Namespaces"],
            )
        ],
        bind=bind,
    )
    await rpc.start()
    told = []
    async with connect(tmp_path / "t.sock") as channel:
        stub = namespace_pb2_grpc.NamespacesStub(channel)
        for metadata in ((("lease", "mine"),), ()):
            request = namespace_pb2.ListNamespacesRequest()
            reply = await stub.List(request, metadata=metadata, timeout=10)
            told.append(reply.namespaces[0].name)
    await rpc.stop(0)
    assert told == ["mine", "none"]


async def test_a_server_waits_for_one_call_at_a_time_whatever_its_methods(server):
    waiting = [task for task in asyncio.all_tasks() if "_request_" in repr(task)]
    assert len(waiting) == 1


async def test_health_can_be_watched(server):
    socket, _, _ = server
    async with connect(socket) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=""), timeout=10
        )
        assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        call.cancel()


async def test_a_successor_takes_the_socket_over_and_keeps_it(tmp_path):
    socket = tmp_path / "t.sock"

    def make():
        return RpcServer(
            tier="test",
            socket=socket,
            services=[],
            metrics=ServerMetrics(),
            reflection=False,
        )

    old, new = make(), make()
    await old.start()
    await new.start()
    await old.stop(0)
    async with connect(socket) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    await new.stop(0)
    assert not socket.exists()


def test_a_socket_path_that_is_too_long_is_refused_in_words(tmp_path):
    with pytest.raises(errors.InvalidArgument, match="at most 107"):
        RpcServer(
            tier="test",
            socket=tmp_path / ("x" * 120),
            services=[],
            metrics=ServerMetrics(),
        )


async def http(socket, request):
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def test_metrics_endpoint_serves_the_page_and_refuses_the_rest(tmp_path):
    async def render():
        return b"up 1\n"

    endpoint = MetricsEndpoint(f"unix:{tmp_path}/m", render)
    await endpoint.start()
    page = await http(tmp_path / "m", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    missing = await http(tmp_path / "m", b"GET / HTTP/1.1\r\n\r\n")
    garbage = await http(tmp_path / "m", b"\x16\x03\x01\r\n\r\n")
    await endpoint.stop()
    assert page.startswith(b"HTTP/1.1 200 OK\r\n")
    assert page.endswith(b"\r\n\r\nup 1\n")
    assert missing.startswith(b"HTTP/1.1 404 ")
    assert garbage.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("address", ["", "9090", "host:", ":1", "host:port", "h:70000"])
def test_a_malformed_metrics_address_is_refused(address):
    with pytest.raises(errors.InvalidArgument, match=r"unix:PATH nor HOST:PORT"):
        MetricsEndpoint(address, None)


class EndlessJournal(journal_pb2_grpc.JournalServicer):
    """Writes for ever; says when its handler has come to its end."""

    def __init__(self):
        self.ended = asyncio.Event()

    async def Read(self, request, context):
        try:
            while True:
                yield journal_pb2.ReadResponse(next_seq=1)
        finally:
            self.ended.set()


async def test_a_stream_ends_when_its_client_is_gone(tmp_path):
    servicer = EndlessJournal()
    rpc = RpcServer(
        tier="test",
        socket=tmp_path / "t.sock",
        metrics=ServerMetrics(),
        services=[
            Service(
                journal_pb2_grpc.add_JournalServicer_to_server,
                servicer,
                journal_pb2.DESCRIPTOR.services_by_name["Journal"],
            )
        ],
    )
    await rpc.start()
    async with connect(tmp_path / "t.sock") as channel:
        call = journal_pb2_grpc.JournalStub(channel).Read(journal_pb2.ReadRequest(), timeout=30)
        assert (await call.read()).next_seq == 1
        call.cancel()
        async with asyncio.timeout(10):
            await servicer.ended.wait()
    await rpc.stop(0)
