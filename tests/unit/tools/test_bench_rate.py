import dataclasses

import pytest

from tools.bench.bench import Bench
from tools.bench.cases.rate import RATE, rate_quantity
from tools.bench.figures import Role, Subject
from tools.bench.goals import GOALS
from tools.bench.scale import FULL, QUICK


class _Engine:
    """Counts what runs; logs the first container of each fleet, and what is left of the last."""

    networks = ("none", "bridge")

    def __init__(self, name, role, api, log, *, fails_in_fleet=None):
        self.subject, self.api = Subject(name, role), api
        self._log, self._fails_in_fleet = log, fails_in_fleet
        self._created, self._running, self._fleets = set(), set(), 0

    async def create(self, plan):
        if not self._created:
            self._fleets += 1
            self._log.append((self.subject.name, plan.network))
        if self._fleets == self._fails_in_fleet:
            raise RuntimeError("no more")
        name = f"{self._fleets}-{len(self._created)}"
        self._created.add(name)
        return name

    async def begin(self, container):
        self._running.add(container)

    async def running(self):
        return len(self._running)

    async def destroy(self, container):
        self._running.discard(container)
        self._created.discard(container)


class _Bench(Bench):
    ours: tuple = ()
    theirs: tuple = ()

    async def containerds(self):
        return list(self.ours)

    async def daemons(self):
        return list(self.theirs)


def _bench(containerds, daemons, **scale):
    made = _Bench(dataclasses.replace(FULL, fleet=20, **scale), None, None, say=lambda _: None)
    made.case, made.ours, made.theirs = "rate", containerds, daemons
    return made


def _engines(log, **options):
    ours = _Engine("Theseus", Role.OURS, "containerd's", log)
    peer = _Engine("containerd", Role.PEER, "containerd's", log, **options)
    daemons = [
        _Engine(name, Role.OURS if name == "Theseus" else Role.PEER, "the daemon's", log)
        for name in ("Theseus", "dockerd", "podman")
    ]
    return (ours, peer), daemons


def _counts(bench):
    return {(f.quantity.what, f.subject.name): len(f.samples) for f in bench.figures}


async def test_rates_with_a_goal_have_three_fleets_of_each_engine_and_others_one():
    containerds, daemons = _engines([])
    bench = _bench(containerds, daemons)

    await RATE.measure(bench)

    goals = {goal.what for goal in GOALS if goal.case == "rate"}
    counts = _counts(bench)
    assert goals <= {what for what, _ in counts}
    assert bench.failures == []
    for (what, name), count in counts.items():
        assert count == (3 if what in goals else 1), (what, name)


async def test_engines_with_the_same_api_take_turns_and_none_is_always_first():
    log = []
    containerds, daemons = _engines(log)
    bench = _bench(containerds, daemons, networks=("none",))

    await RATE.measure(bench)

    fleets = [name for name, _ in log][len(containerds) + len(daemons) :]
    rounds = [fleets[start : start + 2] for start in range(0, 6, 2)]
    assert [sorted(names) for names in rounds] == [["Theseus", "containerd"]] * 3
    assert {names[0] for names in rounds} == {"Theseus", "containerd"}
    rounds = [fleets[start : start + 3] for start in range(6, 15, 3)]
    assert [sorted(names) for names in rounds] == [["Theseus", "dockerd", "podman"]] * 3
    assert {names[0] for names in rounds} == {"Theseus", "dockerd", "podman"}


async def test_a_fleet_that_fails_is_named_and_those_before_it_are_kept():
    # One client, eight clients and a second fleet of these: the third one fails.
    containerds, daemons = _engines([], fails_in_fleet=3)
    bench = _bench(containerds, daemons, networks=("none",))

    await RATE.measure(bench)

    (failure,) = bench.failures
    assert (failure.subject.name, failure.what) == ("containerd", "rate 8 clients, network none")
    counts = _counts(bench)
    for clients, ours, theirs in ((1, 1, 1), (8, 3, 1)):
        what = rate_quantity(containerds[0], "none", clients).what
        assert counts[what, "Theseus"] == ours
        assert counts[what, "containerd"] == theirs


@pytest.mark.parametrize("networks", [("none",), ("none", "bridge")])
async def test_an_engine_has_no_rate_with_a_network_that_it_does_not_make(networks):
    containerds, daemons = _engines([])
    for engine in containerds:
        engine.networks = ("none",)
    bench = _bench(containerds, daemons, networks=networks)

    await RATE.measure(bench)

    measured = {f.quantity.what for f in bench.figures if "bridge" in f.quantity.what}
    assert all("the daemon's" in what for what in measured)
    assert bool(measured) == ("bridge" in networks)


def test_a_quick_run_has_one_fleet():
    assert QUICK.fleets == 1
