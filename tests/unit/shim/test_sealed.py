"""Copies of programs are executed in their place, as long as they are what the file is."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from services.shim.reaper import Reaper
from services.shim.runtimes import sealed
from services.shim.runtimes.invocation import run


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program of which there is a copy; it says what it was executed from."""
    monkeypatch.setattr(sealed, "_copies", {})
    path = str(tmp_path / "busybox")
    shutil.copy("/bin/busybox", path)
    sealed.keep([path])
    yield path
    for copy in sealed._copies.values():
        os.close(copy.fd)


def open_descriptors():
    return sorted(fd.name for fd in Path("/proc/self/fd").iterdir())


async def executed_from(path):
    reaper = Reaper()
    reaper.start()
    try:
        argv = [path, "readlink", "/proc/self/exe"]
        outcome = await run(reaper, argv, stdio=None, timeout_s=10)
    finally:
        reaper.stop()
    assert outcome.succeeded, outcome
    return outcome.output.strip()


async def test_the_copy_is_executed_and_is_one_that_runtimes_trust(program):
    assert await executed_from(program) == "/memfd:runc_cloned:/proc/self/exe (deleted)"
    copy = sealed.executable(program)
    fd = int(copy.rpartition("/")[2])
    # Exactly these: with more or fewer, runc and crun make a copy of their own.
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == 0xF
    assert Path(copy).read_bytes() == Path(program).read_bytes()
    with pytest.raises(PermissionError):
        os.write(fd, b"x")


async def test_a_program_that_was_replaced_is_executed_from_its_file(program, tmp_path):
    shutil.copy("/bin/busybox", tmp_path / "new")
    (tmp_path / "new").rename(program)
    assert await executed_from(program) == program
    before = open_descriptors()
    sealed.renew()  # as the factory does, for its next shim
    assert (await executed_from(program)).startswith("/memfd:")
    assert open_descriptors() == before


def test_a_program_that_is_gone_is_not_executed_from_its_copy(program):
    Path(program).unlink()
    sealed.renew()
    with pytest.raises(FileNotFoundError):
        subprocess.run([program], executable=sealed.executable(program), check=False)


def test_there_are_no_copies_of_scripts_nor_of_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "_copies", {})
    script = tmp_path / "runc"
    script.write_text("#!/bin/sh\n")
    before = open_descriptors()
    sealed.keep([str(script), str(tmp_path / "crun")])
    assert sealed.executable(str(script)) == str(script)
    assert open_descriptors() == before


def test_where_memory_may_not_be_executed_there_are_no_copies(tmp_path, monkeypatch):
    """As with the sysctl vm.memfd_noexec=2."""

    def refuse(name, flags):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sealed, "_copies", {})
    monkeypatch.setattr(os, "memfd_create", refuse)
    before = open_descriptors()
    sealed.keep(["/bin/busybox"])
    assert sealed.executable("/bin/busybox") == "/bin/busybox"
    assert open_descriptors() == before


def in_huge_pages():
    """Of all memory files of the machine, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("ShmemHugePages:"))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("there_are", [True, False])
def test_a_large_program_is_copied_into_huge_pages_where_there_are_any(
    tmp_path, monkeypatch, there_are
):
    size = 40 << 20  # others come and go meanwhile, which are smaller
    monkeypatch.setattr(sealed, "_copies", {})
    if not there_are:
        monkeypatch.setattr(sealed, "_HUGE_PAGE", tmp_path / "none")
    elif not sealed._HUGE_PAGE.exists():
        pytest.skip("this kernel has no huge pages")
    program = tmp_path / "large"
    program.write_bytes(Path("/bin/busybox").read_bytes().ljust(size, b"\7"))
    before, descriptors = in_huge_pages(), open_descriptors()
    sealed.keep([str(program)])
    copy = Path(sealed.executable(str(program)))
    grown = in_huge_pages() - before
    assert (grown > size // 2) == there_are
    assert copy.read_bytes() == program.read_bytes()
    assert fcntl.fcntl(int(copy.name), fcntl.F_GET_SEALS) == 0xF
    os.close(int(copy.name))
    assert open_descriptors() == descriptors
