"""The `theseus` command on a terminal: raw keys, sizes, detaching, and the terminal given back."""

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import struct
import termios

import pytest

from protos.theseus.engine.v1 import images_pb2
from tests.fakes.cli import Cli, until
from tests.fakes.daemon import FakeDaemon


@pytest.fixture
async def daemon(tmp_path):
    fake = FakeDaemon(tmp_path / "d.sock")
    fake.images["busybox"] = images_pb2.Image(id="sha256:1")
    await fake.start()
    yield fake
    await fake.close()


class Terminal:
    """A pseudo terminal with the command on its other side."""

    def __init__(self, daemon):
        self._cli = Cli(daemon.socket)
        self.ours, self.theirs = pty.openpty()
        os.set_blocking(self.ours, False)
        self.seen = b""

    async def run(self, *arguments):
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs)
        self.process = await self._cli.spawn(*arguments, **streams)

    def size(self, columns, rows):
        packed = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, packed)

    def is_raw(self):
        return not termios.tcgetattr(self.theirs)[3] & termios.ICANON

    def shows(self, text):
        with contextlib.suppress(BlockingIOError):
            self.seen += os.read(self.ours, 65536)
        return text in self.seen

    def type(self, keys):
        os.write(self.ours, keys)

    async def ended(self):
        async with asyncio.timeout(10):
            return await self.process.wait()


@pytest.fixture
async def terminal(daemon):
    made = Terminal(daemon)
    yield made
    if made.process.returncode is None:
        made.process.kill()
        await made.process.wait()
    os.close(made.ours)
    os.close(made.theirs)


async def test_keys_pass_as_they_are_and_the_terminal_comes_back(daemon, terminal):
    before = termios.tcgetattr(terminal.theirs)
    await terminal.run("run", "-it", "busybox", "cat")
    await until(lambda: daemon.asked("Wait"))
    assert terminal.is_raw()
    played = next(iter(daemon.containers.values())).process
    keys = b"\x03\x04ab\x1b[A\r"
    terminal.type(keys)
    await until(lambda: bytes(played.taken) == keys)
    await until(lambda: terminal.shows(keys))  # its echo: cat's, not the terminal's
    assert not daemon.asked("Kill")
    await played.update(lambda: setattr(played, "input_closed", True))
    assert await terminal.ended() == 0
    assert termios.tcgetattr(terminal.theirs) == before


async def test_the_process_learns_the_size_and_its_changes(daemon, terminal):
    terminal.size(100, 40)
    await terminal.run("run", "-it", "busybox", "size", "3")
    await until(lambda: terminal.shows(b"100x40\r\n"))
    terminal.size(90, 30)
    terminal.process.send_signal(signal.SIGWINCH)
    await until(lambda: terminal.shows(b"90x30\r\n"))
    await daemon.restart()  # and again after a new attach
    await until(lambda: terminal.seen.count(b"90x30") == 2 or terminal.shows(b"90x30\r\n90x30\r\n"))
    assert await terminal.ended() == 0


async def test_ctrl_p_ctrl_q_detaches(daemon, terminal):
    await terminal.run("run", "-it", "--name", "c", "busybox", "cat")
    await until(lambda: daemon.asked("Wait"))
    terminal.type(b"\x10x\x10")
    played = next(iter(daemon.containers.values())).process
    await until(lambda: bytes(played.taken) == b"\x10x")
    terminal.type(b"\x11")
    assert await terminal.ended() == 0
    assert terminal.shows(b"read escape sequence")
    assert not terminal.is_raw()
    assert played.code is None
    await terminal.run("attach", "c")
    await until(lambda: len(daemon.asked("Attach")) == 2 and terminal.is_raw())
    terminal.type(b"more")
    await until(lambda: bytes(played.taken) == b"\x10xmore")
    await played.update(lambda: setattr(played, "input_closed", True))
    assert await terminal.ended() == 0


async def test_a_signal_from_elsewhere_gives_the_terminal_back(daemon, terminal):
    await terminal.run("run", "-it", "busybox", "cat")
    await until(lambda: daemon.asked("Wait") and terminal.is_raw())
    terminal.process.send_signal(signal.SIGTERM)
    assert await terminal.ended() == 143
    assert not terminal.is_raw()
    assert not daemon.asked("Kill")


async def test_exec_has_a_size_from_its_start(daemon, terminal):
    terminal.size(80, 25)
    await terminal.run("run", "-d", "--name", "c", "busybox", "sleep")
    assert await terminal.ended() == 0
    await terminal.run("exec", "-it", "c", "echo", "hi")
    assert await terminal.ended() == 0
    request = daemon.asked("ExecCreate")[0]
    assert (request.width, request.height, request.tty) == (80, 25, True)
    assert terminal.shows(b"hi")


async def test_a_pull_draws_its_progress_in_place(daemon, terminal):
    daemon.pullable["x"] = images_pb2.Image(id="sha256:1", digest="sha256:2")
    await terminal.run("pull", "x")
    assert await terminal.ended() == 0
    assert terminal.shows(b"aaaaaaaaaaaa: Downloading [===============>")
    assert b"500B/1e+03B" not in terminal.seen
    assert b"500B/1kB" in terminal.seen
    assert terminal.seen.count(b"\x1b[1A\x1b[2K") == 2
