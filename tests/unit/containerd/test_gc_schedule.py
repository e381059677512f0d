"""When garbage is collected: the timetable on a made-up clock, and the schedule on a real one."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.background import Background
from services.common.errors import Unavailable
from services.containerd.durations import format_duration, parse_duration
from services.containerd.gc.collector import Collection
from services.containerd.gc.policy import GcPolicy
from services.containerd.gc.scheduler import GcSchedule
from services.containerd.gc.timetable import Timetable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NEVER = GcPolicy(startup_delay_s=3600, idle_interval_s=0)
INTERVAL_S = 0.005 / 0.02 - 0.005
"""Between collections that take no time, by default."""


def begun(policy: GcPolicy = GcPolicy(), *, pause_s: float = 0.0) -> Timetable:  # noqa: B008
    """A timetable whose first collection has ended at 10."""
    timetable = Timetable(policy)
    timetable.begin(9)
    timetable.began()
    timetable.ended(10, pause_s=pause_s)
    return timetable


def test_the_first_collection_comes_after_the_start_whatever_happens_meanwhile() -> None:
    timetable = Timetable(GcPolicy())
    timetable.deleted(4)
    assert timetable.due_s == math.inf
    timetable.begin(5)
    assert timetable.due_s == 5.1
    for _ in range(1000):
        timetable.deleted(5.05)
    assert timetable.due_s == 5.1


@pytest.mark.parametrize(
    ("pause_s", "threshold", "interval_s"),
    [
        (0.0, 0.02, INTERVAL_S),
        (0.02, 0.02, 0.98),
        (1.0, 0.5, 1.0),
        (1.0, 0.9, 1.0),  # more than a half counts as a half
        (7.0, 0.0, 1.0),
    ],
)
def test_a_deletion_is_collected_at_the_end_of_its_interval(
    pause_s: float, threshold: float, interval_s: float
) -> None:
    timetable = begun(GcPolicy(pause_threshold=threshold), pause_s=pause_s)
    timetable.deleted(10 + 2.5 * interval_s)
    assert timetable.due_s == pytest.approx(10 + 3 * interval_s)
    timetable.deleted(10 + 2.9 * interval_s)
    assert timetable.due_s == pytest.approx(10 + 3 * interval_s)


def test_changes_alone_are_collected_when_there_are_many_or_much_time_has_passed() -> None:
    timetable = begun()
    for _ in range(99):
        timetable.changed(10.01)
    assert timetable.due_s == 310
    timetable.changed(10.01)
    assert timetable.due_s == pytest.approx(10 + INTERVAL_S)
    timetable = begun(GcPolicy(mutation_threshold=0, idle_interval_s=0))
    for _ in range(1000):
        timetable.changed(10.01)
    assert timetable.due_s == math.inf


def test_one_that_is_asked_for_does_not_wait_for_an_interval() -> None:
    timetable = begun()
    timetable.deleted(10.01)
    timetable.asked(10.02)
    assert timetable.due_s == 10.02
    timetable = begun(GcPolicy(schedule_delay_s=0.1, deletion_threshold=2))
    timetable.deleted(10.01)
    assert timetable.due_s == pytest.approx(10 + INTERVAL_S)
    timetable.deleted(10.02)
    assert timetable.due_s == pytest.approx(10.12)
    timetable.asked(10.05)
    assert timetable.due_s == pytest.approx(10.12)


def test_what_happens_during_a_collection_is_for_the_next_one() -> None:
    timetable = begun()
    timetable.deleted(10.01)
    timetable.began()
    timetable.deleted(10.3)
    assert timetable.due_s == math.inf
    timetable.ended(20, pause_s=0)
    assert timetable.due_s == pytest.approx(20 + INTERVAL_S)
    timetable.began()
    timetable.asked(20.5)
    timetable.ended(21, pause_s=0)
    assert timetable.due_s == 20.5
    timetable.began()
    timetable.ended(22, pause_s=0)
    assert timetable.due_s == 322


def test_a_failed_collection_is_tried_again_later_each_time_and_forgets_nothing() -> None:
    timetable = begun()
    timetable.deleted(10.01)
    now, waits = 10.5, []
    for _ in range(70):
        timetable.began()
        timetable.failed(now)
        waits.append(timetable.due_s - now)
        timetable.deleted(now)  # does not hurry the next attempt
        assert timetable.due_s - now == waits[-1]
        now = timetable.due_s
    assert waits[:2] == pytest.approx([INTERVAL_S + 1, INTERVAL_S + 2])
    assert waits[-1] == 60
    timetable.asked(now - 1)
    assert timetable.due_s == now - 1
    first = Timetable(GcPolicy())
    first.begin(0)
    first.began()
    first.failed(1)
    assert first.due_s == 3.0  # a second's interval, and another one


class Upstream:
    """The rule by which upstream's scheduler goes, as a clock that ticks at each interval.

    Told of the same events, it says at each tick whether there is a collection.
    """

    def __init__(self, policy: GcPolicy, now_s: float) -> None:
        self.policy = policy
        self.next_s = now_s + policy.startup_delay_s
        self.first = True
        self.deletions = self.mutations = 0
        self.triggered = False
        self.pauses: list[float] = []
        self.interval_s = 1.0

    def event(self, now_s: float, kind: str) -> None:
        self.deletions += kind == "deleted"
        self.mutations += kind != "asked"
        self.triggered |= kind == "asked"
        threshold = self.policy.deletion_threshold
        if self.triggered or (threshold and self.deletions >= threshold):
            self.next_s = min(self.next_s, now_s + self.policy.schedule_delay_s)

    def tick(self, pause_s: float) -> bool:
        now_s = self.next_s
        threshold = self.policy.mutation_threshold
        many = threshold > 0 and self.mutations >= threshold
        due = self.first or self.triggered or self.deletions > 0 or many
        if due:
            self.first = self.triggered = False
            self.deletions = self.mutations = 0
            self.pauses.append(pause_s)
            if self.policy.pause_threshold > 0:
                mean = max(sum(self.pauses) / len(self.pauses), 0.005)
                self.interval_s = mean / min(self.policy.pause_threshold, 0.5) - mean
        self.next_s = now_s + self.interval_s
        return due


POLICIES = st.builds(
    GcPolicy,
    pause_threshold=st.sampled_from([0.0, 0.02, 0.25, 0.5, 0.8]),
    deletion_threshold=st.integers(0, 4),
    mutation_threshold=st.integers(0, 6),
    schedule_delay_s=st.sampled_from([0.0, 0.03, 0.5]),
    startup_delay_s=st.sampled_from([0.1, 1.0]),
    idle_interval_s=st.just(0.0),  # which upstream has not
)
EVENTS = st.lists(
    st.tuples(st.floats(0.001, 2.0), st.sampled_from(["changed", "deleted", "asked"])), max_size=40
)


@given(policy=POLICIES, events=EVENTS, pauses=st.lists(st.floats(0, 0.5), min_size=1, max_size=5))
def test_collections_come_when_upstream_would_have_them(
    policy: GcPolicy, events: list[tuple[float, str]], pauses: list[float]
) -> None:
    def pause_s(collections: int) -> float:
        return pauses[collections % len(pauses)]

    upstream, theirs = Upstream(policy, 0.0), list[float]()
    timetable, ours = Timetable(policy), list[float]()
    timetable.begin(0.0)
    now_s = ticked_s = 0.0
    for wait_s, kind in [*events, (20.0, "")]:
        now_s += wait_s
        while upstream.next_s <= now_s:
            ticked_s = at_s = upstream.next_s
            if upstream.tick(pause_s(len(theirs))):
                theirs.append(at_s)
        while timetable.due_s <= now_s:
            at_s = timetable.due_s
            timetable.began()
            timetable.ended(at_s, pause_s=pause_s(len(ours)))
            ours.append(at_s)
        # What comes in the moment of a tick may fall on either side of it.
        if kind and min(now_s - ticked_s, upstream.next_s - now_s) > 1e-6:
            upstream.event(now_s, kind)
            getattr(timetable, kind)(now_s)
    assert ours == pytest.approx(theirs)


@given(
    events=EVENTS,
    pauses=st.lists(st.floats(0.001, 0.5), min_size=1, max_size=5),
    share=st.sampled_from([0.02, 0.25, 0.5]),
)
def test_scheduled_collections_take_no_more_than_their_share(
    events: list[tuple[float, str]], pauses: list[float], share: float
) -> None:
    timetable = Timetable(GcPolicy(pause_threshold=share))
    timetable.begin(0.0)
    now_s = paused_s = longest_s = 0.0
    collections = 0
    for wait_s, kind in events:
        now_s += wait_s
        if timetable.due_s <= now_s:
            pause_s = pauses[collections % len(pauses)]
            longest_s = max(longest_s, pause_s)
            collections += 1
            paused_s += pause_s
            timetable.began()
            now_s += pause_s
            timetable.ended(now_s, pause_s=pause_s)
        if kind != "asked":
            getattr(timetable, kind)(now_s)
        assert paused_s - longest_s <= share * now_s + longest_s


class CountingCollector:
    """Counts, fails when it is told to, and can be held up."""

    def __init__(self) -> None:
        self.runs = 0
        self.fail = False
        self.changed = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def collect(self) -> Collection:
        self.runs += 1
        self.changed.set()
        await self.go_on.wait()
        if self.fail:
            self.fail = False
            raise OSError("the disk is full")
        return Collection((), 0, 0.0, 0.0)

    async def wait(self, runs: int) -> None:
        async with asyncio.timeout(5):
            while self.runs < runs:
                self.changed.clear()
                await self.changed.wait()


class Running:
    def __init__(self, policy: GcPolicy) -> None:
        self.observed: list[Collection | None] = []
        self.collector = CountingCollector()
        self.schedule = GcSchedule(policy, observe=self.observed.append)


@asynccontextmanager
async def running(policy: GcPolicy) -> AsyncIterator[Running]:
    made = Running(policy)
    async with Background() as background:
        background.start(made.schedule.run(made.collector), name="gc")
        yield made


async def test_deletions_are_gathered() -> None:
    async with running(GcPolicy(startup_delay_s=0, pause_threshold=0.5)) as node:
        await node.collector.wait(1)
        for _ in range(100):
            node.schedule.deleted()
        await node.collector.wait(2)
        await asyncio.sleep(0.02)  # four intervals
        assert node.collector.runs == 2
        assert len(node.observed) == 2


async def test_time_alone_is_enough() -> None:
    async with running(GcPolicy(idle_interval_s=0.001)) as node:
        await node.collector.wait(3)


async def test_who_asks_waits_for_a_collection_that_began_after_that() -> None:
    async with running(NEVER) as node, asyncio.timeout(5), asyncio.TaskGroup() as group:
        node.collector.go_on.clear()
        first = group.create_task(node.schedule.collect())
        await node.collector.wait(1)
        others = [group.create_task(node.schedule.collect()) for _ in range(3)]
        others[0].cancel()
        node.collector.go_on.set()
        await first
        await asyncio.wait(others)
        assert node.collector.runs == 2  # one for all of them


async def test_who_asks_hears_of_a_failure_and_another_collection_follows() -> None:
    async with running(NEVER) as node, asyncio.timeout(5):
        node.collector.fail = True
        with pytest.raises(OSError, match="full"):
            await node.schedule.collect()
        assert node.observed == [None]
        await node.schedule.collect()
        assert node.collector.runs == 2


async def test_who_asks_hears_of_a_stop() -> None:
    async with running(NEVER) as node:
        node.collector.go_on.clear()
        under_way = asyncio.create_task(node.schedule.collect())
        await node.collector.wait(1)
        later = asyncio.create_task(node.schedule.collect())
        await asyncio.sleep(0)
    for asked in (under_way, later, asyncio.create_task(node.schedule.collect())):
        async with asyncio.timeout(5):
            with pytest.raises(Unavailable, match="stops"):
                await asked


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("0s", 0),
        ("100ms", 0.1),
        ("1.5s", 1.5),
        ("1m30s", 90),
        ("2h0m1s", 7201),
        (".5us", 5e-7),
        ("", None),
        ("5", None),
        ("-1s", None),
        ("1s 2s", None),
        ("1d", None),
    ],
)
def test_durations_are_read_as_go_writes_them(text: str, seconds: float | None) -> None:
    read = parse_duration(text)
    assert read == (None if seconds is None else pytest.approx(seconds))
    if read:
        assert parse_duration(format_duration(read)) == pytest.approx(read)
