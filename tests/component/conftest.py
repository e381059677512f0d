"""A real factory, and shims of it on the fake runtime, for the tests of the shim."""

import pytest

from tests.fakes.registry_server import FakeRegistry
from tests.fakes.runtime import install
from tests.fakes.shim_harness import FactoryProcess, ShimMaker


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    factory = FactoryProcess(tmp_path_factory.mktemp("factory"))
    yield factory
    assert factory.stop() == 0


@pytest.fixture
async def maker(factory, tmp_path):
    async with ShimMaker(factory, tmp_path) as maker:
        yield maker


@pytest.fixture
def fake(tmp_path):
    return install(tmp_path / "fake")


@pytest.fixture
async def registry(maker):
    registry = FakeRegistry(maker.registry_socket)
    await registry.start()
    yield registry
    await registry.stop()
