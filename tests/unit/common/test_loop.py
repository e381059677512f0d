"""The loop of containerd and daemon: programs, above all, since those are started another way."""

import asyncio
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import pytest

from services.common.loop import Loop

LIMIT_S = 20
ALL = ("stdin", "stdout", "stderr")
forks = []
os.register_at_fork(before=lambda: forks.append("fork"))  # stays for good, and counts all


def run(main):
    async def limited():
        async with asyncio.timeout(LIMIT_S):
            return await main

    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(limited())


def shell(script, *arguments, **options):
    return asyncio.create_subprocess_exec("sh", "-c", script, "sh", *arguments, **options)


def open_descriptors():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def test_a_program_is_given_input_and_its_output_and_status_are_told():
    async def main():
        process = await shell(
            'read line; echo "got $line"; echo oops >&2; exit 3',
            **dict.fromkeys(ALL, PIPE),
        )
        return await process.communicate(b"a line\n"), process.returncode, await process.wait()

    assert run(main()) == ((b"got a line\n", b"oops\n"), 3, 3)


@pytest.mark.parametrize("told", [b"", b"a line\n", b"x" * 300_000])
def test_input_that_a_program_does_not_read_is_no_error(told):
    async def main():
        process = await shell("exec 0</dev/null; echo out; exit 1", **dict.fromkeys(ALL, PIPE))
        assert await process.stdout.readline() == b"out\n"  # its input is closed
        return await process.communicate(told), process.returncode

    assert run(main()) == ((b"", b""), 1)


def test_all_that_a_program_said_before_its_end_is_read():
    async def main():
        process = await shell("yes | head -c 1000000", stdin=DEVNULL, stdout=PIPE)
        return len((await process.communicate())[0])

    assert run(main()) == 1_000_000


def test_the_end_of_one_that_was_killed_is_told_and_leaves_no_descriptor():
    async def main():
        process = await shell("exec sleep 600", stdin=PIPE, stdout=PIPE)
        waiting = asyncio.ensure_future(process.wait())
        await asyncio.sleep(0)
        process.kill()
        return await waiting

    before = open_descriptors()
    assert run(main()) == -signal.SIGKILL
    assert open_descriptors() == before


def test_a_program_has_no_descriptor_but_the_standard_ones():
    async def main():
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        try:
            process = await shell("ls /proc/self/fd", stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
            return (await process.communicate())[0]
        finally:
            os.close(reading)
            os.close(writing)

    assert run(main()) == b"0\n1\n2\n3\n"  # the last one is that of the directory


def test_what_goes_on_in_the_background_does_not_hold_the_pipes():
    async def main():
        process = await shell(
            "sleep 30 < /dev/null > /dev/null 2> /dev/null & echo $! >&2",
            **{"stdin": DEVNULL, "stdout": DEVNULL, "stderr": PIPE},
        )
        said = (await process.communicate())[1]
        os.kill(int(said), signal.SIGKILL)
        return process.returncode

    assert run(main()) == 0


def test_a_program_is_not_started_by_a_fork_of_this_process():
    """gRPC's fork handlers write to the connections that a fork shares with its parent."""

    async def main():
        process = await shell("exit 0", stdin=DEVNULL, start_new_session=True)
        return await process.wait()

    forks.clear()
    assert run(main()) == 0
    assert not forks
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    assert forks  # it would have been seen


def test_a_program_that_does_not_exist_is_an_error_and_leaves_no_descriptor():
    async def main():
        await asyncio.create_subprocess_exec("/no/such/program", stdin=PIPE, stdout=PIPE)

    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        run(main())
    assert open_descriptors() == before


def test_a_start_that_is_cancelled_leaves_no_program():
    async def main():
        started = []
        loop = asyncio.get_running_loop()
        connect = loop.connect_read_pipe

        async def connect_read_pipe(*arguments):
            started.append(True)
            task.cancel()
            return await connect(*arguments)

        loop.connect_read_pipe = connect_read_pipe
        task = asyncio.ensure_future(shell("exec sleep 600", stdin=DEVNULL, stdout=PIPE))
        await asyncio.wait([task])
        return started, task.cancelled()

    before = open_descriptors(), children()
    assert run(main()) == ([True], True)
    assert (open_descriptors(), children()) == before
