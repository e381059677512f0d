"""Spans of shims: one process serves one container after the other, and each has its own."""

import pytest

from tests.component.test_shim_waiting import again, live  # noqa: F401 - a fixture
from tests.fakes.collector import collecting
from tests.fakes.shim_harness import FactoryProcess, plain_spec


@pytest.fixture(params=["http/protobuf"])
def protocol(request):
    return request.param


@pytest.fixture
def gone():
    """Whether nobody listens where the collector is said to be."""
    return False


@pytest.fixture
def collector(monkeypatch, protocol, gone):
    with collecting(protocol) as collector:
        endpoint = "http://127.0.0.1:1" if gone else collector.endpoint
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # only what is flushed comes
        yield collector


@pytest.fixture
def factory(collector, tmp_path):
    (tmp_path / "factory").mkdir()
    factory = FactoryProcess(tmp_path / "factory")
    yield factory
    assert factory.stop() == 0


async def one_life(maker, fake, process):
    """Have a process be a container's shim; returns the container's id."""
    bundle = maker.bundle(plain_spec("/bin/sleep", "1000"))
    shim = await process.be(maker, bundle)
    await live(shim, fake)
    await shim.shutdown()
    await shim.close_client()
    return bundle.name


def recorded(collector, container_id):
    """Names of the methods that were served and made for a container."""
    spans = [s for s in collector.spans if s.attributes["container.id"] == container_id]
    return {span.name.rpartition("/")[2] for span in spans}


ALL = {"Create", "Start", "Kill", "Wait", "Delete", "Shutdown"}


async def test_each_container_of_a_process_has_its_spans(maker, fake, again, collector):  # noqa: F811
    for _ in range(3):
        container_id = await one_life(maker, fake, again)
        assert (await again.next()).get("waiting") == again.pid
        # It waits again: nothing of its life is still on its way.
        assert recorded(collector, container_id) >= ALL
    assert len({span.attributes["container.id"] for span in collector.spans}) == 3


@pytest.mark.parametrize("protocol", ["grpc"])
async def test_one_that_stays_connected_to_the_collector_ends(maker, fake, again, collector):  # noqa: F811
    container_id = await one_life(maker, fake, again)
    assert await again.next() == {}
    assert recorded(collector, container_id) >= ALL


@pytest.mark.parametrize("gone", [True])
async def test_a_collector_that_is_gone_ends_a_process_and_no_more(maker, fake, again, collector):  # noqa: F811
    await one_life(maker, fake, again)
    assert "waiting" not in await again.next()
    assert collector.spans == []
