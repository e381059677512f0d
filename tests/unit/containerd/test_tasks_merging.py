"""Bursts of KSM: when there are some, and that the kernel's switches are as before after them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import pytest

from services.containerd.tasks.merging import MemoryMerger
from tests.fakes.eventually import eventually

if TYPE_CHECKING:
    from pathlib import Path

FOUND = {"run": "0", "pages_to_scan": "100", "sleep_millisecs": "30"}


class Kernel:
    """The files of KSM and of processes."""

    def __init__(self, directory: Path) -> None:
        self.ksm, self.proc = directory / "ksm", directory / "proc"
        self.saved = directory / "saved.json"
        self.ksm.mkdir()
        self.proc.mkdir()
        figures = {"full_scans": "7", "pages_shared": "1", "pages_sharing": "2"}
        for name, value in {**FOUND, **figures}.items():
            (self.ksm / name).write_text(value)
        for pid in range(2):
            self.process(pid)

    def process(self, pid: int, comm: str = "theseus-shim", *, mergeable: str = "yes") -> None:
        directory = self.proc / str(pid)
        directory.mkdir()
        (directory / "comm").write_text(f"{comm}\n")
        (directory / "ksm_stat").write_text(f"ksm_merge_any: no\nksm_mergeable: {mergeable}\n")

    def __getitem__(self, name: str) -> str:
        return (self.ksm / name).read_text()

    def switches(self) -> dict[str, str]:
        return {name: self[name] for name in FOUND}

    def scanned(self, number: int) -> None:
        (self.ksm / "full_scans").write_text(str(number))

    def merger(self, *, allowed: bool = True, settling_s: float = 0) -> MemoryMerger:
        return MemoryMerger(
            self.saved, allowed=allowed, ksm=self.ksm, proc=self.proc, settling_s=settling_s
        )


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


async def test_a_burst_lasts_three_scans_and_leaves_the_switches_as_they_were(
    kernel: Kernel,
) -> None:
    async with kernel.merger() as merger:
        for number in (10, 13):
            await eventually(lambda: kernel["run"] == "1")
            assert int(kernel["pages_to_scan"]) > 100
            assert json.loads(kernel.saved.read_bytes()) == FOUND
            kernel.scanned(number - 1)
            kernel.scanned(number)
            await eventually(lambda: kernel.switches() == FOUND and not kernel.saved.exists())
            merger.request()


async def test_a_burst_begins_when_no_shim_was_started_for_so_long_and_no_later(
    kernel: Kernel,
) -> None:
    async with kernel.merger(settling_s=1) as merger:
        await asyncio.sleep(0.2)
        began = time.monotonic()
        merger.request()
        await eventually(lambda: kernel["run"] == "1")
        assert 1 <= time.monotonic() - began < 1.7


async def test_a_stop_in_a_burst_ends_it(kernel: Kernel) -> None:
    async with kernel.merger():
        await eventually(lambda: kernel["run"] == "1")
    assert kernel.switches() == FOUND
    assert not kernel.saved.exists()


@pytest.mark.parametrize("saved", [json.dumps(FOUND), '{"run": '])
async def test_a_start_undoes_the_burst_that_its_predecessor_died_in(
    kernel: Kernel, saved: str
) -> None:
    if saved.endswith("}"):
        (kernel.ksm / "run").write_text("1")
        (kernel.ksm / "pages_to_scan").write_text("2000")
    kernel.saved.write_text(saved)
    async with kernel.merger(allowed=False):
        assert kernel.switches() == FOUND
        assert not kernel.saved.exists()


@pytest.mark.parametrize("why", ["runs", "unmerges", "others", "one shim", "not told", "off"])
async def test_the_kernel_is_left_alone(kernel: Kernel, why: str) -> None:
    match why:
        case "runs" | "unmerges":
            (kernel.ksm / "run").write_text("1" if why == "runs" else "2")
        case "others":
            kernel.process(99, "qemu")
        case "one shim":
            (kernel.proc / "1" / "ksm_stat").write_text("ksm_mergeable: no\n")
        case "not told":
            for pid in ("0", "1"):
                (kernel.proc / pid / "ksm_stat").write_text("ksm_merge_any: no\n")
    before = kernel.switches()
    merger = kernel.merger(allowed=why != "off")
    async with merger:
        await asyncio.to_thread(lambda: None)
        if why != "off":
            assert await asyncio.to_thread(merger._begin) is None
        assert kernel.switches() == before
        assert not kernel.saved.exists()


async def test_a_kernel_that_does_not_go_along_has_its_switches_back(kernel: Kernel) -> None:
    async with kernel.merger():
        await eventually(lambda: kernel["run"] == "1")
        (kernel.ksm / "full_scans").unlink()
        await eventually(lambda: kernel.switches() == FOUND and not kernel.saved.exists())


async def test_a_kernel_without_ksm_is_no_failure(tmp_path: Path) -> None:
    async with MemoryMerger(tmp_path / "saved", ksm=tmp_path / "none", settling_s=0) as merger:
        merger.request()
