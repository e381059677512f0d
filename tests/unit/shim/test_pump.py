from __future__ import annotations

import asyncio
import os
import socket
import sys

import pytest

from services.common.errors import FailedPrecondition, Internal, OutOfRange
from services.shim.stdio.console import ConsoleSocket, resize
from services.shim.stdio.fd_sink import FdSink, open_output
from services.shim.stdio.input import FifoInput, Input
from services.shim.stdio.pump import READ_MAX_BYTES, Pump
from tests.fakes.eventually import eventually


class Collector:
    """A sink that keeps everything and is ready when the test says so."""

    def __init__(self):
        self.data = b""
        self.finished = []
        self.ready = True
        self.callbacks = []
        self.settled = 0

    def when_ready(self, callback):
        self.callbacks.append(callback)

    def write(self, stream, data):
        self.data += data

    def finish(self, stream):
        self.finished.append(stream)

    async def settle(self):
        self.settled += 1

    async def close(self):
        pass

    def go_on(self):
        self.ready = True
        for callback in self.callbacks:
            callback()


def pump(fd, sink, counted=None, **options):
    os.set_blocking(fd, False)
    counted = [] if counted is None else counted
    made = Pump(fd, "stdout", sink, read=lambda _, data: counted.append(len(data)), **options)
    made.start()
    return made


async def test_pipe_is_read_to_its_end_in_growing_pieces():
    read, write = os.pipe()
    sink, sizes = Collector(), []
    made = pump(read, sink, sizes)
    data = os.urandom(1 << 20) * 4

    def feed():
        with os.fdopen(write, "wb") as file:
            file.write(data)

    await asyncio.to_thread(feed)
    async with asyncio.timeout(10):
        await made.done.wait()
    assert sink.data == data
    assert sink.finished == ["stdout"]
    assert 65536 < max(sizes) <= READ_MAX_BYTES
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


async def test_reading_stops_while_the_sink_wants_no_more():
    read, write = os.pipe()
    sink = Collector()
    sink.ready = False
    made = pump(read, sink)
    os.write(write, b"first")
    await eventually(lambda: sink.data == b"first" and sink.callbacks)
    os.write(write, b" second")
    await asyncio.sleep(0.02)
    assert sink.data == b"first"
    sink.go_on()
    await eventually(lambda: sink.data == b"first second")
    os.close(write)
    async with asyncio.timeout(10):
        await made.done.wait()


async def test_settle_takes_what_is_there_now():
    read, write = os.pipe()
    sink = Collector()
    made = pump(read, sink)
    os.write(write, b"there")
    await made.settle()
    assert (sink.data, sink.settled) == (b"there", 1)
    made.stop()
    made.stop()
    assert sink.finished == ["stdout"]
    os.close(write)


async def test_terminal_ends_with_its_other_end():
    master, slave = os.openpty()
    sink = Collector()
    made = pump(master, sink, owns_fd=False)
    os.write(slave, b"out\n")
    os.close(slave)
    async with asyncio.timeout(10):
        await made.done.wait()
    assert sink.data == b"out\r\n"
    os.close(master)


async def test_fifo_client_that_is_late_and_slow_gets_everything(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    sink = FdSink(open_output(path, field="stdout"))
    data = os.urandom(300_000)
    sink.write("stdout", data)
    assert not sink.ready
    ready = asyncio.Event()
    sink.when_ready(ready.set)
    sink.finish("stdout")
    got = await asyncio.to_thread(path.read_bytes)
    assert got == data
    assert ready.is_set()
    sink.write("stdout", b"too late")  # closed: nowhere to go, nobody harmed


async def test_file_is_appended_to_and_a_missing_one_is_named(tmp_path):
    path = tmp_path / "plain"
    path.write_bytes(b"a")
    sink = FdSink(open_output(path, field="stdout"), streams=2)
    sink.write("stdout", b"b")
    sink.finish("stdout")
    sink.write("stderr", b"c")
    sink.finish("stderr")
    assert path.read_bytes() == b"abc"
    with pytest.raises(FailedPrecondition, match="No such file"):
        open_output(tmp_path / "missing", field="stdout")


async def test_gone_reader_of_a_pipe_does_not_stop_the_process():
    read, write = os.pipe2(os.O_NONBLOCK)
    os.close(read)
    sink = FdSink(write)
    sink.write("stdout", b"x")
    assert sink.ready


async def test_input_waits_and_counts_and_takes_each_byte_once():
    read, write = os.pipe2(os.O_NONBLOCK)
    stdin = Input(write, terminal=False)
    writer = object()
    stdin.take_over(writer)
    data = os.urandom(200_000)
    writing = asyncio.ensure_future(stdin.write_at(writer, 0, data))
    await asyncio.sleep(0.01)
    assert not writing.done()
    got = b""
    while len(got) < len(data):
        await asyncio.sleep(0)
        try:
            got += os.read(read, 65536)
        except BlockingIOError:
            await asyncio.sleep(0.001)
    await writing
    assert (got, stdin.taken) == (data, len(data))
    await stdin.write_at(writer, len(data) - 10, data[-10:] + b"new")
    assert os.read(read, 100) == b"new"
    with pytest.raises(OutOfRange):
        await stdin.write_at(writer, len(data) + 100, b"x")
    stdin.take_over(object())
    with pytest.raises(FailedPrecondition, match="took over"):
        await stdin.write_at(writer, stdin.taken, b"x")
    stdin.end()
    assert os.read(read, 1) == b""
    os.close(read)
    await stdin.write(b"dropped")


async def test_closing_input_wakes_its_writer():
    read, write = os.pipe2(os.O_NONBLOCK)
    stdin = Input(write, terminal=False)
    writing = asyncio.ensure_future(stdin.write(b"x" * 1_000_000))
    await asyncio.sleep(0.01)
    stdin.close()
    async with asyncio.timeout(5):
        await writing
    os.close(read)


async def test_process_that_closed_its_input_takes_the_rest_to_nowhere():
    read, write = os.pipe2(os.O_NONBLOCK)
    os.close(read)
    stdin = Input(write, terminal=False)
    await stdin.write(b"abc")
    assert stdin.taken == 3
    stdin.close()


async def test_fifo_input_ends_with_the_last_client_after_release(tmp_path):
    path = tmp_path / "in"
    os.mkfifo(path)
    read, write = os.pipe()
    os.set_blocking(write, False)
    fifo = FifoInput.open(path, Input(write, terminal=False))
    copying = asyncio.ensure_future(fifo.copy())
    await asyncio.to_thread(path.write_bytes, b"one ")
    await asyncio.to_thread(path.write_bytes, b"two")
    await asyncio.sleep(0.01)
    assert not copying.done()
    fifo.release()
    async with asyncio.timeout(10):
        await copying
    assert os.read(read, 100) == b"one two"
    assert os.read(read, 100) == b""
    os.close(read)


async def test_console_is_received_over_a_path_longer_than_an_address(tmp_path):
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    with ConsoleSocket(directory, "console") as console:
        assert len(console.address) < 107
        script = (
            "import os,socket,sys;m,s=os.openpty();"
            "c=socket.socket(socket.AF_UNIX);c.connect(sys.argv[1]);"
            "socket.send_fds(c,[b'x'],[m]);"
        )
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, console.address)
        master = await console.receive()
        await child.wait()
    resize(master, width=80, height=24)
    assert os.get_terminal_size(master) == (80, 24)
    assert not os.get_inheritable(master)
    os.close(master)
    assert list(directory.iterdir()) == []


async def test_runtime_that_hands_over_no_terminal_is_told(tmp_path):
    with ConsoleSocket(tmp_path, "console") as console:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(console.address)
            peer.send(b"no terminal")
        with pytest.raises(Internal, match="not one terminal"):
            await console.receive()
