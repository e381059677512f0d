"""Plain numbers, and the page that Prometheus reads of them."""

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.common.metrics import BOUNDS, Histogram, Registry, ServerMetrics


def parsed(page: bytes):
    """Families by name, as Prometheus' own library reads the page."""
    return {family.name: family for family in text_string_to_metric_families(page.decode())}


def values(family):
    return {(s.name, *sorted(s.labels.items())): s.value for s in family.samples}


def test_a_page_says_what_each_family_is_and_what_it_counts():
    registry = Registry()
    registry.counter("runs_total", "Runs.").inc()
    ended = registry.counters("ended_total", "How runs ended.", ("outcome", "kind"))
    ended.labels("ok", "pull").inc(3)
    ended.labels("ok", "pull").inc()
    ended.labels("failed", "push").inc()
    registry.gauge("seq", "The newest.").set(7)
    registry.gauges("there", "What there is.", ("kind",)).labels("blob").set(2.5)
    found = parsed(registry.page())
    # The parser leaves out what the name of a counter ends in.
    assert {name: (f.type, f.documentation) for name, f in found.items()} == {
        "runs": ("counter", "Runs."),
        "ended": ("counter", "How runs ended."),
        "seq": ("gauge", "The newest."),
        "there": ("gauge", "What there is."),
    }
    assert values(found["runs"]) == {("runs_total",): 1}
    assert values(found["ended"]) == {
        ("ended_total", ("kind", "pull"), ("outcome", "ok")): 4,
        ("ended_total", ("kind", "push"), ("outcome", "failed")): 1,
    }
    assert values(found["seq"]) == {("seq",): 7}
    assert values(found["there"]) == {("there", ("kind", "blob")): 2.5}


def test_a_number_without_labels_is_there_before_it_counts_and_one_with_labels_is_not():
    registry = Registry()
    registry.counter("runs_total", "Runs.")
    registry.counters("ended_total", "How runs ended.", ("outcome",))
    found = parsed(registry.page())
    assert values(found["runs"]) == {("runs_total",): 0}
    assert found["ended"].samples == []


def test_buckets_of_a_histogram_add_up():
    registry = Registry()
    histogram = registry.histogram("took_seconds", "Time.", (0.5, 1, 2))
    for amount in (0.1, 0.5, 0.7, 3):  # a bound belongs to its bucket
        histogram.observe(amount)
    family = parsed(registry.page())["took_seconds"]
    assert family.type == "histogram"
    assert values(family) == {
        ("took_seconds_bucket", ("le", "0.5")): 2,
        ("took_seconds_bucket", ("le", "1.0")): 3,
        ("took_seconds_bucket", ("le", "2.0")): 3,
        ("took_seconds_bucket", ("le", "+Inf")): 4,
        ("took_seconds_count",): 4,
        ("took_seconds_sum",): pytest.approx(4.3),
    }


def test_histograms_with_labels_have_the_usual_bounds_unless_told():
    registry = Registry()
    took = registry.histograms("took_seconds", "Time.", ("kind",))
    took.labels("a").observe(0.06)
    long = registry.histograms("long_seconds", "Time.", ("kind",), (60, 600))
    long.labels("b").observe(90)
    found = parsed(registry.page())
    edges = [s.labels["le"] for s in found["took_seconds"].samples if "le" in s.labels]
    assert edges == [*(repr(float(bound)) for bound in BOUNDS), "+Inf"]
    assert values(found["long_seconds"])["long_seconds_bucket", ("kind", "b"), ("le", "600.0")] == 1


def test_time_is_observed_when_the_block_fails_too():
    histogram = Histogram()
    with histogram.time():
        time.sleep(0.001)
    with pytest.raises(ZeroDivisionError), histogram.time():
        raise ZeroDivisionError
    assert sum(histogram.counts) == 2
    assert histogram.total >= 0.001


@pytest.mark.parametrize("text", ['say "hi"', "back\\slash", "two\nlines", "a}b,c=d", "ü"])
def test_any_text_can_be_the_value_of_a_label(text):
    registry = Registry()
    registry.gauges("there", "What there is.", ("kind",)).labels(text).set(1)
    (sample,) = parsed(registry.page())["there"].samples
    assert sample.labels == {"kind": text}


@pytest.mark.parametrize("value", [0, 1, 0.1, 123456789012, 1e300, float("inf"), -3])
def test_any_number_is_read_as_it_is(value):
    registry = Registry()
    registry.gauge("number", "A number.").set(value)
    (sample,) = parsed(registry.page())["number"].samples
    assert sample.value == value


def test_parts_of_a_page_come_in_their_order_and_are_asked_each_time():
    registry = Registry()
    registry.gauge("first", "First.").set(1)
    asked = []

    def lines():
        asked.append(1)
        yield f"# TYPE second gauge\nsecond {len(asked)}\n"

    registry.add(lines)
    registry.gauge("third", "Third.")
    assert list(parsed(registry.page())) == ["first", "second", "third"]
    assert values(parsed(registry.page())["second"]) == {("second",): 2}


def test_calls_of_a_server_are_counted_and_timed():
    metrics = ServerMetrics()
    call = ("unary", "a.v1.Service", "Get")
    for code in ("OK", "OK", "NotFound"):
        metrics.begin(call)
        metrics.end(call, code, 0.02)
    metrics.begin(("bidi_stream", "a.v1.Service", "Watch"))
    registry = Registry()
    registry.add(metrics.lines)
    found = parsed(registry.page())
    get = (("grpc_method", "Get"), ("grpc_service", "a.v1.Service"), ("grpc_type", "unary"))
    watch = (
        ("grpc_method", "Watch"),
        ("grpc_service", "a.v1.Service"),
        ("grpc_type", "bidi_stream"),
    )
    assert values(found["grpc_server_started"]) == {
        ("grpc_server_started_total", *get): 3,
        ("grpc_server_started_total", *watch): 1,
    }
    assert values(found["grpc_server_handled"]) == {
        ("grpc_server_handled_total", ("grpc_code", "OK"), *get): 2,
        ("grpc_server_handled_total", ("grpc_code", "NotFound"), *get): 1,
    }
    timed = values(found["grpc_server_handling_seconds"])
    assert timed["grpc_server_handling_seconds_count", *get] == 3
    assert ("grpc_server_handling_seconds_count", *watch) not in timed  # it goes on
    within = [
        timed["grpc_server_handling_seconds_bucket", *get, ("le", edge)]
        for edge in ("0.01", "0.025")
    ]
    assert within == [0, 3]
