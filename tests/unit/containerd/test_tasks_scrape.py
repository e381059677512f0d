"""Merging pages of metrics."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.common.errors import Unavailable
from services.containerd.tasks.gone import Epitaph, GoneShim
from services.containerd.tasks.scrape import merge, scrape

ROUNDS = 5  # other work on the machine may spoil some


def page(value: float) -> bytes:
    registry = CollectorRegistry()
    Gauge("up", "Whether it is up.", registry=registry).set(value)
    Counter("bytes", "Bytes.", ("stream",), registry=registry).labels('a"b}').inc(value)
    Histogram("seconds", "Time.", registry=registry).observe(value)
    return generate_latest(registry)


def test_families_are_merged_and_samples_are_labelled() -> None:
    merged = merge([("n", "c1", page(1)), ("n", "c2", page(2))]).decode()
    assert merged.count("# TYPE up gauge") == 1
    assert merged.count("# HELP seconds ") == 1
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert {(s.labels["shim"], s.value) for s in families["up"].samples} == {
        ("c1", 1.0),
        ("c2", 2.0),
    }
    totals = [s for s in families["bytes"].samples if s.name == "bytes_total"]
    assert {(s.labels["namespace"], s.labels["stream"]) for s in totals} == {("n", 'a"b}')}
    buckets = [s for s in families["seconds"].samples if s.name == "seconds_bucket"]
    assert len({(s.labels["shim"], s.labels["le"]) for s in buckets}) == len(buckets) > 20


def test_samples_of_a_family_stay_together_whatever_the_order() -> None:
    first = b"# TYPE a gauge\na 1\n# TYPE b gauge\nb 1\n"
    second = b"# TYPE b gauge\nb 2\n# TYPE a gauge\na{} 2\nlonely 3 1700000000\n# a comment\n"
    assert merge([("n", "x", first), ("n", "y", second)]).decode().split("\n") == [
        "# TYPE a gauge",
        'a{namespace="n",shim="x"} 1',
        'a{namespace="n",shim="y"} 2',
        "# TYPE b gauge",
        'b{namespace="n",shim="x"} 1',
        'b{namespace="n",shim="y"} 2',
        'lonely{namespace="n",shim="y"} 3 1700000000',
        "",
    ]


def shims_page() -> bytes:
    """As long as that of a shim that was asked all that can be asked."""
    heads = [f"# HELP calls_{n} Calls.\n# TYPE calls_{n} counter" for n in range(10)]
    samples = [
        f'calls_{n}{{grpc_service="containerd.task.v3.Task",grpc_method="M{m}"}} {m}'
        for n in range(10)
        for m in range(26)
    ]
    return "\n".join([*heads, *samples, ""]).encode()


async def test_a_thousand_shims_are_one_page_within_a_second_whatever_one_does() -> None:
    text = shims_page()

    class Answering(GoneShim):
        async def metrics(self) -> bytes:
            await asyncio.sleep(0.001)
            return text

    class Stuck(GoneShim):
        async def metrics(self) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

    epitaph = Epitaph("c", "a fake")
    shims = [("n", f"c{index}", Answering(epitaph)) for index in range(999)]
    shims.insert(17, ("n", "stuck", Stuck(epitaph)))
    took_s = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        merged, unanswered = await scrape(shims, timeout_s=0.8)
        took_s.append(time.perf_counter() - began)
        assert unanswered == 1
        assert merged.count(b"\n") == 20 + 999 * 260
        if took_s[-1] < 1.0:
            return
    raise AssertionError(f"not one of {ROUNDS} rounds took less than 1 s: {took_s}")


async def test_one_that_fails_is_counted() -> None:
    class Broken(GoneShim):
        async def metrics(self) -> bytes:
            raise Unavailable("not now")

    epitaph = Epitaph("c1", "it is dead")
    shims = [("n", "c1", GoneShim(epitaph)), ("n", "c2", Broken(epitaph))]
    assert await scrape(shims, timeout_s=1) == (b"", 1)
    assert await scrape([], timeout_s=1) == (b"", 0)
