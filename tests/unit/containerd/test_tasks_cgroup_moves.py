"""The kernel made ready for moves between cgroups: where, how often, and that nothing is moved."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.containerd.tasks.cgroup_moves import CgroupMoves, own_cgroup, write_itself
from tests.fakes.eventually import eventually


class Cgroups:
    """Files as the kernel has them, with this process in the cgroup ``/here`` of each hierarchy."""

    def __init__(self, directory: Path) -> None:
        self.root, self.proc = directory / "cgroup", directory / "proc"
        self.root.mkdir()
        self.proc.write_text("")

    def add(self, names: str, place: str, *, pids: str = "") -> Path:
        directory = self.root / place / "here"
        directory.mkdir(parents=True)
        (directory / "cgroup.procs").write_text(pids or f"1\n{os.getpid()}\n")
        with self.proc.open("a") as file:
            file.write(f"0:{names}:/here\n")
        return directory

    def moves(self, **options: object) -> CgroupMoves:
        return CgroupMoves(root=self.root, proc=self.proc, **options)  # type: ignore[arg-type]

    def own(self) -> Path:
        return own_cgroup(self.proc.read_text(), self.root)


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    return Cgroups(tmp_path)


class Lock:
    """Counts who takes it; while ``free`` is not set nobody gets it."""

    def __init__(self) -> None:
        self.taken: list[Path] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, file: Path) -> None:
        self.taken.append(file)
        assert self.free.wait(10)


def test_the_cgroup_of_v2(cgroups: Cgroups) -> None:
    (cgroups.root / "cgroup.controllers").touch()
    assert cgroups.add("", "") == cgroups.own()


@pytest.mark.parametrize(
    ("names", "place"), [("cpu,cpuacct", "cpu"), ("name=systemd", "systemd"), ("", "unified")]
)
def test_a_cgroup_of_v1_or_of_a_hybrid_host(cgroups: Cgroups, names: str, place: str) -> None:
    with cgroups.proc.open("a") as file:
        file.write("2:freezer:/here\n")  # not mounted
    assert cgroups.add(names, place) == cgroups.own()


def test_a_cgroup_outside_of_the_namespace_is_none(cgroups: Cgroups) -> None:
    (cgroups.root / "pids").mkdir()
    (cgroups.root / "cgroup.procs").touch()
    cgroups.proc.write_text("1:pids:/..\n")
    with pytest.raises(FileNotFoundError, match="no cgroup"):
        cgroups.own()


async def test_this_process_is_written_where_it_is(cgroups: Cgroups) -> None:
    directory = cgroups.add("pids", "pids")
    async with cgroups.moves() as moves:
        moves.expect()
        await eventually(lambda: (directory / "cgroup.procs").read_text().startswith("0"))


async def test_it_is_written_where_it_was_moved_to_meanwhile(cgroups: Cgroups) -> None:
    lock = Lock()
    async with cgroups.moves(write=lock) as moves:
        before = cgroups.add("pids", "pids") / "cgroup.procs"
        moves.expect()
        await eventually(lambda: lock.taken == [before])
        cgroups.proc.write_text("")
        after = cgroups.add("freezer", "freezer") / "cgroup.procs"
        moves.expect()
        await eventually(lambda: lock.taken == [before, after])


async def test_one_write_at_a_time_serves_all_that_come_meanwhile(cgroups: Cgroups) -> None:
    cgroups.add("pids", "pids")
    lock = Lock()
    lock.free.clear()
    async with cgroups.moves(write=lock) as moves:
        moves.expect()
        await eventually(lambda: len(lock.taken) == 1)
        for _ in range(100):
            moves.expect()
            await asyncio.sleep(0)
        assert len(lock.taken) == 1
        lock.free.set()
        await eventually(lambda: len(lock.taken) == 2)
        await asyncio.sleep(0.03)  # time for a third one, were it due
        assert len(lock.taken) == 2


async def test_what_is_under_way_is_waited_for_at_the_end(cgroups: Cgroups) -> None:
    cgroups.add("pids", "pids")
    lock = Lock()
    lock.free.clear()
    moves = cgroups.moves(write=lock)
    async with moves:
        moves.expect()
        await eventually(lambda: len(lock.taken) == 1)
        threading.Timer(0.05, lock.free.set).start()
    assert lock.free.is_set()


@pytest.mark.parametrize("pids", ["1\n2\n", ""])
async def test_what_does_not_work_is_said_once_and_not_tried_again(
    cgroups: Cgroups, pids: str
) -> None:
    attempts = []

    def read_only(file: Path) -> None:
        attempts.append(file)
        raise OSError(30, "Read-only file system", str(file))

    cgroups.add("pids", "pids", pids=pids)
    with capture_logs() as logs:
        async with cgroups.moves(write=read_only) as moves:
            moves.expect()
            await eventually(lambda: logs)
            moves.expect()
            await asyncio.sleep(0.02)
    assert [entry["event"] for entry in logs] == ["moves between cgroups are not sped up"]
    assert len(attempts) == (0 if pids else 1)  # nothing is written into another's cgroup


@pytest.mark.root
async def test_the_kernel_takes_it_and_moves_nothing() -> None:
    before = Path("/proc/self/cgroup").read_text()
    written = []

    def write(file: Path) -> None:
        write_itself(file)
        written.append(file)

    async with CgroupMoves(write=write) as moves:
        moves.expect()
        await eventually(lambda: written)
    assert Path("/proc/self/cgroup").read_text() == before
