"""Who shares a process with whom."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from services.common import linux
from services.common.errors import FailedPrecondition, Unavailable
from services.containerd.tasks import sharing
from services.containerd.tasks.bundle import Bundle
from services.containerd.tasks.groups import group_of
from services.containerd.tasks.known import KnownShim, Standing
from services.containerd.tasks.processes import ProcessId
from services.containerd.tasks.sharing import Sharing
from services.containerd.tasks.shim import ShimAddress, ShimRequest

LIVING = ProcessId(os.getpid(), linux.process_start_time(os.getpid()) or 0)
DEAD = ProcessId(os.getpid(), 1)


class Host:
    """The shim's side: answers, or fails as it is told."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.asked: list[str] = []

    async def host(self, request: ShimRequest) -> ShimAddress:
        self.asked.append(request.id)
        await asyncio.sleep(0)
        if self.failures:
            raise self.failures.pop(0)
        return ShimAddress(LIVING, "unix:///host", "1")

    async def leave(self, *, now: bool) -> None:
        self.asked.append("now" if now else "leave")
        if self.failures:
            raise self.failures.pop(0)


class World:
    """Shims, and a launcher that starts one for each request."""

    def __init__(self, *, most: int = 1) -> None:
        self.known: list[KnownShim] = []
        self.host = Host()
        self.started: list[str] = []
        self.sharing = Sharing(
            lambda: self.known, find_way=self._find_way, meet=self._meet, most=most
        )

    def shim(self, name: str, group: str, process: ProcessId | None = None) -> KnownShim:
        known = KnownShim(Bundle("ns", name, Path("/x") / name), "0" * 32, Standing.STARTING)
        known.group, known.process = group, process
        known.address = "unix:///host" if process is not None else ""
        if process is not None:
            known.turn(Standing.REGISTERED)
        self.known.append(known)
        return known

    async def start(self, known: KnownShim) -> ShimAddress:
        request = ShimRequest(
            known.namespace, known.id, known.bundle.path, Path("/s"), known.instance_id
        )
        return await self.sharing.start(self, known, request)

    async def start_shim(self, request: ShimRequest, *, timeout_s: float = 30.0) -> ShimAddress:
        self.started.append(request.id)
        await asyncio.sleep(0)
        return ShimAddress(LIVING, "unix:///own", "1")

    def _find_way(self, known: KnownShim, address: str) -> None:
        known.address, known.shim = address, self.host  # type: ignore[assignment]

    def _meet(self, known: KnownShim, address: ShimAddress) -> None:
        known.process, known.address = address.process, address.address


@pytest.mark.parametrize(
    ("annotations", "group"),
    [
        ({"io.kubernetes.cri.sandbox-id": "p"}, "p"),
        ({"io.kubernetes.cri.sandbox-id": "p", "io.containerd.runc.v2.group": "g"}, "g"),
        ({"io.containerd.runc.v2.group": ""}, ""),
        ({"io.containerd.runc.v2.group": 7}, ""),
        (None, ""),
        ("text", ""),
    ],
)
def test_the_group_is_what_upstreams_annotations_name(annotations: Any, group: str) -> None:
    assert group_of({"annotations": annotations}) == group


async def test_the_second_of_a_group_joins_the_first_even_at_the_same_time() -> None:
    world = World()
    pod = [world.shim(f"c{number}", "pod") for number in range(4)]
    await asyncio.gather(*(world.start(known) for known in pod))
    assert world.started == ["c0"]
    assert world.host.asked == ["c1", "c2", "c3"]
    assert world.sharing.company(pod[0]) == pod[1:]


async def test_without_a_group_everyone_is_alone() -> None:
    world = World()
    alone = [world.shim(f"c{number}", "") for number in range(3)]
    for known in alone:
        await world.start(known)
    assert world.started == ["c0", "c1", "c2"]


async def test_groups_and_namespaces_are_kept_apart() -> None:
    world = World()
    world.shim("c0", "pod", LIVING).bundle = Bundle("other", "c0", Path("/y"))
    world.shim("c1", "another", LIVING)
    await world.start(world.shim("c2", "pod"))
    assert world.started == ["c2"]


@pytest.mark.parametrize("standing", [Standing.REMOVING, Standing.SILENT, Standing.BURYING])
async def test_who_is_on_its_way_out_is_not_joined(standing: Standing) -> None:
    world = World()
    world.shim("c0", "pod", LIVING).turn(standing)
    await world.start(world.shim("c1", "pod"))
    assert world.started == ["c1"]


async def test_a_dead_process_is_not_joined() -> None:
    world = World()
    world.shim("c0", "pod", DEAD)
    await world.start(world.shim("c1", "pod"))
    assert world.started == ["c1"]


async def test_who_refuses_is_asked_once_and_a_process_of_its_own_started() -> None:
    world = World()
    world.host.failures = [FailedPrecondition("about to end")]
    world.shim("c0", "pod", LIVING)
    world.shim("c1", "pod", LIVING)
    known = world.shim("c2", "pod")
    await world.start(known)
    assert world.host.asked == ["c2"]
    assert world.started == ["c2"]
    assert known.joining is None


async def test_a_process_that_executes_itself_anew_is_asked_again() -> None:
    world = World()
    world.host.failures = [Unavailable("gone"), Unavailable("gone")]
    world.shim("c0", "pod", LIVING)
    await world.start(world.shim("c1", "pod"))
    assert world.host.asked == ["c1"] * 3
    assert world.started == []


async def test_who_is_about_to_join_counts_as_company() -> None:
    world = World()
    first, second = world.shim("c0", "pod", LIVING), world.shim("c1", "pod")
    starting = asyncio.create_task(world.start(second))
    await asyncio.sleep(0)
    assert second.process is None
    assert world.sharing.company(first) == [second]
    await starting


async def test_so_many_to_a_process() -> None:
    world = World(most=2)
    for number in range(2):
        world.shim(f"c{number}", "", LIVING)
    await world.start(world.shim("c2", ""))
    assert world.started == ["c2"]


async def test_leaving_goes_on_over_a_reexecution_and_ends_a_forgotten_container() -> None:
    world = World()
    known = world.shim("c0", "pod", LIVING)
    world.host.failures = [Unavailable("gone"), FailedPrecondition("it has a container")]
    known.shim = world.host  # type: ignore[assignment]
    assert await sharing.leave(known, now=False, limit_s=5)
    assert world.host.asked == ["leave", "leave", "now"]
    known.process = DEAD
    assert await sharing.leave(known, now=False, limit_s=5)


async def test_who_does_not_let_go_in_time_is_told_of() -> None:
    world = World()
    known = world.shim("c0", "pod", LIVING)
    world.host.failures = [Unavailable("stuck")] * 100
    known.shim = world.host  # type: ignore[assignment]
    assert not await sharing.leave(known, now=False, limit_s=0.05)
