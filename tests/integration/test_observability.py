"""Metrics of all tiers, and a request id that leads through the logs of all of them."""

import asyncio
import json
import re
import socket

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from services.common.client import connect
from tests.integration.theseus import until

pytestmark = pytest.mark.root


def page(path):
    """A metrics page, parsed: name of each sample to the samples."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        data = b""
        while piece := client.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def entries(theseus):
    """What the tiers logged."""
    for line in theseus.engine.log.read_text().splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def test_every_tier_has_a_metrics_page(theseus):
    theseus.start("--name", "measured", "--", "sleep", "60")
    pages = {
        tier: page(theseus.engine.state / tier / "metrics.sock")
        for tier in ("daemon", "containerd")
    }
    for samples in pages.values():
        assert {"grpc_server_started_total", "grpc_server_handled_total"} <= set(samples)
        assert "grpc_server_handling_seconds_bucket" in samples
    started = {
        sample.labels["grpc_method"]: sample.value
        for sample in pages["daemon"]["grpc_server_started_total"]
        if sample.labels["grpc_service"] == "theseus.engine.v1.Containers"
    }
    assert started["Start"] >= 1
    assert any(name.startswith("theseus_daemon_") for name in pages["daemon"])
    assert any(name.startswith("theseus_containerd_") for name in pages["containerd"])
    # The shims' figures are on containerd's page.
    assert any(name.startswith("theseus_shim_") for name in pages["containerd"])


def test_a_page_is_valid_while_shims_come_and_go(theseus):
    processes = [theseus.spawn("run", "--rm", theseus.image, "true") for _ in range(4)]
    for _ in range(5):
        page(theseus.engine.state / "containerd" / "metrics.sock")
    for process in processes:
        process.communicate(timeout=40)
        assert process.returncode == 0


def test_a_request_id_leads_from_the_message_through_three_tiers(theseus):
    result = theseus.run("--", "no-such-command")
    (request,) = re.findall(r"\(request ([0-9a-f]{16})\)", result.err)

    def tiers():
        return {
            entry.get("tier") for entry in entries(theseus) if entry.get("request_id") == request
        }

    until(lambda: {"daemon", "containerd"} <= tiers())


def test_the_shims_log_has_the_request_id_too(theseus):
    identity = theseus.start("--name", "logged", "--", "sleep", "60")
    log = theseus.engine.state / "containerd" / "tasks" / "theseus" / identity / "shim.log"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    requests = {line.get("request_id") for line in lines} - {None}
    known = {entry.get("request_id") for entry in entries(theseus) if entry.get("tier") == "daemon"}
    assert requests & known
    assert {line["tier"] for line in lines} == {"shim"}


def test_every_log_line_is_one_json_object(theseus):
    for line in theseus.engine.log.read_text().splitlines():
        entry = json.loads(line)
        assert {"event", "level", "timestamp", "tier"} <= set(entry), line


def test_no_traceback_was_logged(theseus):
    broken = [entry for entry in entries(theseus) if "exception" in entry]
    assert broken == []


@pytest.mark.parametrize("tier", ["daemon", "containerd"])
def test_health_and_reflection(theseus, tier):
    path = theseus.engine.socket if tier == "daemon" else theseus.engine.containerd
    own = (
        "theseus.engine.v1.Containers" if tier == "daemon" else "containerd.services.tasks.v1.Tasks"
    )

    async def ask():
        async with connect(path) as channel:
            health = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=10
            )
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            call = stub.ServerReflectionInfo(iter([request]), timeout=10)
            answers = [answer async for answer in call]
            return health.status, {s.name for s in answers[0].list_services_response.service}

    status, services = asyncio.run(ask())
    assert status == health_pb2.HealthCheckResponse.SERVING
    assert {own, "grpc.health.v1.Health"} <= services


def test_health_of_a_shim(theseus):
    theseus.start("--name", "shimmed", "--", "sleep", "60")
    (path,) = (theseus.engine.state / "containerd" / "s").iterdir()

    async def ask():
        async with connect(path) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status

    assert asyncio.run(ask()) == health_pb2.HealthCheckResponse.SERVING


def test_sockets_are_for_root_and_the_group_only(theseus):
    for path in (theseus.engine.socket, theseus.engine.containerd):
        assert path.stat().st_mode & 0o777 == 0o660
        assert path.stat().st_uid == 0


def test_codes_of_failures_are_counted(theseus):
    def not_found():
        samples = page(theseus.engine.state / "daemon" / "metrics.sock")
        return sum(
            sample.value
            for sample in samples["grpc_server_handled_total"]
            if sample.labels["grpc_method"] == "Get" and sample.labels["grpc_code"] == "NotFound"
        )

    before = not_found()
    theseus("inspect", "--type", "container", "no-such-container")
    assert not_found() == before + 1
