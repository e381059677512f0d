"""Spans of one run, out of three tiers, in one trace."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.fakes.collector import collecting
from tests.integration.theseus import Theseus
from tools import engine as engines

pytestmark = pytest.mark.root


@pytest.fixture
def collector(monkeypatch):
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield collector


@pytest.fixture
def traced(collector, registry_address, whole_engine):
    """An engine of its own: the image is in the registry that the other one uses."""
    home = Path(tempfile.mkdtemp(prefix="theseus-o-", dir="/tmp"))
    try:
        options = ["--bridge-name", "ttrace0", "--bridge-subnet", "10.98.0.1/16"]
        options.append("--containerd-option=--merge-memory=off")
        with engines.running(home, options) as engine:
            yield Theseus(engine, registry_address)
    finally:
        shutil.rmtree(home)


def test_a_run_is_one_trace_over_all_tiers(collector, traced):
    traced.ok("pull", traced.image)
    traced.ok("run", "--rm", "--network", "none", "--runtime", "runc", traced.image, "true")
    created = collector.one("runc create", "theseus-shim")
    collector.one("theseus.engine.v1.Containers/Start", "theseus-daemon")
    collector.one("containerd.services.tasks.v1.Tasks/Create", "theseus-containerd")
    assert collector.ancestors(created) == [
        "containerd.task.v3.Task/Create",  # served by the shim
        "containerd.task.v3.Task/Create",  # made by containerd
        "containerd.services.tasks.v1.Tasks/Create",
        "containerd.services.tasks.v1.Tasks/Create",
        "theseus.engine.v1.Containers/Start",
    ]
    commit = collector.one("commit", "theseus-daemon")
    assert commit.attributes["database"].endswith(".db")
