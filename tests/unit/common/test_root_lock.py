"""Two owners of one root, in one process and in two."""

import asyncio
import os
import subprocess
import sys

import pytest

from services.common.errors import FailedPrecondition
from services.common.root_lock import RootLock


async def test_a_second_owner_is_told_who_the_first_is(tmp_path):
    async with RootLock(tmp_path).held(0):
        with pytest.raises(FailedPrecondition, match=f"belongs to process {os.getpid()}"):
            async with RootLock(tmp_path).held(0.05):
                pass


async def test_a_second_owner_waits_for_the_first_to_leave(tmp_path):
    left = asyncio.Event()

    async def second():
        async with RootLock(tmp_path).held(10):
            assert left.is_set()

    async with RootLock(tmp_path).held(0):
        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        left.set()
    await waiting


async def test_a_killed_owner_leaves_no_lock(tmp_path):
    program = """
import asyncio, sys, pathlib
from services.common.root_lock import RootLock
async def main():
    async with RootLock(pathlib.Path(sys.argv[1])).held(0):
        print("held", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout.readline() == b"held\n"
        with pytest.raises(FailedPrecondition, match=f"belongs to process {owner.pid}"):
            async with RootLock(tmp_path).held(0):
                pass
        owner.kill()
    async with RootLock(tmp_path).held(1):
        pass
