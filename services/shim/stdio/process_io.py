"""All streams of one process: opened before it is created, pumped while it runs, closed after.

pipes     process ──pipe──▶ Pump ──▶ Output ──▶ LogWriter      theseus-log:, theseus-stream:
                              └────▶ FdSink ──▶ FIFO           paths
                              └────▶ LogWriter (raw)           file:
          process ──pipe──▶ logger program                     binary:
terminal  process ──pty───▶ Pump ──▶ as above, one stream
input     FIFO or attached clients ──▶ Input ──pipe or pty──▶ process
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from services.common.errors import FailedPrecondition
from services.shim.runtimes.runtime import RuntimeStdio
from services.shim.stdio import console, meter, uris
from services.shim.stdio.fd_sink import FdSink, open_output
from services.shim.stdio.formats import FORMATS, RawFormat
from services.shim.stdio.input import FifoInput, Input
from services.shim.stdio.log_writer import LogWriter
from services.shim.stdio.logger import LoggerProcess, start_logger
from services.shim.stdio.meter import Meter
from services.shim.stdio.output import Output
from services.shim.stdio.pump import Pump
from services.shim.stdio.sink import STDERR, STDOUT, Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from services.common.background import Background
    from services.shim.handover import Outgoing
    from services.shim.measures import Measures
    from services.shim.reaper import Reaper

_FINISH_LIMIT_S = 10.0
_PAUSE_LIMIT_S = 5.0


class ProcessIo:
    """The streams of one process. Made by :func:`open_io`.

    Attributes:
        output: what attached clients read; None when the streams are not the shim's.
        input: what attached clients write to; None when standard input is not theirs.
        log: the log file, or None.
    """

    def __init__(
        self,
        stdio: uris.Stdio,
        metrics: Measures,
        background: Background,
        release: Callable[[int], None] = os.close,
    ) -> None:
        self.stdio = stdio
        self._release = release
        self._meter: Meter | None = None
        self.output: Output | None = None
        self.input: Input | None = None
        self.log: LogWriter | None = None
        self.attachable_input = False
        self._metrics = metrics
        self._background = background
        self._sinks: dict[str, Sink] = {}
        self._unique_sinks: list[Sink] = []
        self._pipes: dict[str, int] = {}
        self._theirs: list[int] = []
        self._runtime_stdio: RuntimeStdio | None = None
        self._pumps: list[Pump] = []
        self._fifo_input: FifoInput | None = None
        self._copying: asyncio.Task[None] | None = None
        self._stdin_source: uris.Input = uris.Nothing()
        self._logger: LoggerProcess | None = None
        self._master = -1

    @property
    def runtime_stdio(self) -> RuntimeStdio | None:
        """What the runtime gives the process; None with a terminal."""
        return self._runtime_stdio

    def start(self, master: int = -1) -> None:
        """The process is created: close its ends, begin to copy.

        Args:
            master: of its terminal, if it has one; closed by :meth:`close`.
        """
        self._close_theirs()
        if self.stdio.terminal:
            self._master = master
            self.input = Input(master, terminal=True, close=self._release, took=self._took)
            if STDOUT in self._sinks:
                self._add_pump(master, STDOUT, owns_fd=False)
        for stream, fd in self._pipes.items():
            self._add_pump(fd, stream, owns_fd=True)
        self._pipes.clear()
        if isinstance(self._stdin_source, uris.Fifo) and self.input is not None:
            self._fifo_input = FifoInput.open(
                self._stdin_source.path, self.input, close=self._release
            )
            self._copy_input()

    async def pause(self) -> None:
        """Read no more, and let what was read get where it belongs, as far as it can.

        Raises:
            TimeoutError: a disk is too slow.
        """
        for pump in self._pumps:
            pump.pause()
        async with asyncio.timeout(_PAUSE_LIMIT_S):
            for sink in self._unique_sinks:
                await sink.settle()

    def resume(self) -> None:
        """Go on after :meth:`pause`, or after :meth:`unpack`."""
        for pump in self._pumps:
            pump.resume()
        self._copy_input()

    def pack(self, out: Outgoing) -> dict[str, Any]:
        """What the next image of the shim goes on with; while paused.

        Raises:
            FailedPrecondition: output waits for space on a disk.
        """
        return {
            "sinks": [sink.pack(out) for sink in self._unique_sinks],
            "sink_of": {
                stream: self._unique_sinks.index(sink) for stream, sink in self._sinks.items()
            },
            "pumps": [saved for pump in self._pumps if (saved := pump.pack(out)) is not None],
            "input": self.input.pack(out) if self.input is not None else None,
            "fifo_input": self._fifo_input.pack(out) if self._fifo_input is not None else None,
            "logger": self._logger.pack() if self._logger is not None else None,
            "master": out.fd(self._master),
            "meter": out.fd(self._meter.fd if self._meter is not None else -1),
        }

    def unpack(self, saved: Mapping[str, Any], reaper: Reaper) -> None:
        """Become what was packed, paused: ``resume`` begins to copy."""
        self._parse()
        if saved["meter"] >= 0:
            self._meter = Meter(saved["meter"])
        owners = {number: stream for stream, number in reversed(saved["sink_of"].items())}
        for number, sink in enumerate(saved["sinks"]):
            self._unique_sinks.append(self._unpack_sink(sink, owners[number]))
        self._sinks = {
            stream: self._unique_sinks[number] for stream, number in saved["sink_of"].items()
        }
        self._master = saved["master"]
        for pump in saved["pumps"]:
            if pump["fd"] >= 0:
                self._add_pump(pump["fd"], pump["stream"], owns_fd=pump["owns_fd"], paused=True)
            else:  # it had read the end of it
                self._sinks[pump["stream"]].finish(pump["stream"])
        if saved["input"] is not None:
            self.input = Input.unpack(saved["input"], close=self._release, took=self._took)
        fifo = saved["fifo_input"]
        if fifo is not None and fifo["fd"] >= 0 and self.input is not None:
            self._fifo_input = FifoInput.unpack(
                saved["fifo_input"], self.input, close=self._release
            )
        if saved["logger"] is not None:
            self._logger = LoggerProcess.unpack(saved["logger"], reaper)

    def resize(self, *, width: int, height: int) -> None:
        """Set the size of the terminal.

        Raises:
            FailedPrecondition: there is none.
        """
        if not self.stdio.terminal:
            raise FailedPrecondition("the process has no terminal to resize")
        if self._master >= 0:
            console.resize(self._master, width=width, height=height)

    def end_input(self) -> None:
        """Close standard input as far as the shim holds it open (CloseIO)."""
        if self._fifo_input is not None:
            self._fifo_input.release()
        elif self.input is not None:
            self.input.end()

    async def settle(self) -> None:
        """Take what the process left in its pipes, and wait until a log file has it."""
        for pump in self._pumps:
            await pump.settle()

    async def close(self, *, drain: bool) -> None:
        """Close everything.

        Args:
            drain: let a reader or a slow disk take the rest first, for some seconds: other
                processes may hold the pipes open for ever.
        """
        if drain and not (self.output is not None and self.output.abandoned):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FINISH_LIMIT_S):
                    for pump in self._pumps:
                        await pump.done.wait()
        for pump in self._pumps:
            pump.stop()
        self._close_theirs()
        for fd in self._pipes.values():
            os.close(fd)
        self._pipes.clear()
        if self.input is not None:
            self.input.close()
        if self._fifo_input is not None:
            self._fifo_input.release()
        for sink in self._unique_sinks:
            await sink.close()
        if self._master >= 0:
            self._release(self._master)
            self._master = -1
        if self._meter is not None:
            self._meter.close()
            self._release(self._meter.fd)
            self._meter = None
        if self._logger is not None:
            self._background.start(self._logger.stop(), name="logger end")

    async def open(self, reaper: Reaper, *, container_id: str, namespace: str) -> None:
        """Open all that can fail, before the process exists. Called by :func:`open_io`."""
        stdout, stderr = self._parse()
        self._meter = Meter()
        if isinstance(self._stdin_source, uris.Fifo) and not self._stdin_source.path.exists():
            raise FailedPrecondition(
                f"stdin '{self._stdin_source.path}' does not exist", field="stdin"
            )
        if isinstance(stdout, uris.Logger):
            self._logger = await start_logger(
                reaper, stdout, container_id=container_id, namespace=namespace
            )
        if self.stdio.terminal:
            self._open_sinks({STDOUT: stdout})
            return
        if isinstance(stdout, uris.RawFile) and not isinstance(stderr, uris.RawFile):
            stderr = stdout  # as upstream: a file takes both
        outputs = {STDOUT: stdout, STDERR: stderr}
        self._open_sinks(outputs)
        self._runtime_stdio = RuntimeStdio(
            stdin=self._open_stdin(),
            stdout=self._open_stream(STDOUT, stdout),
            stderr=self._open_stream(STDERR, stderr),
        )

    def _parse(self) -> tuple[uris.Output, uris.Output]:
        self._stdin_source = uris.parse_input(self.stdio.stdin)
        self.attachable_input = isinstance(self._stdin_source, uris.Attachable)
        return (
            uris.parse_output(self.stdio.stdout, field="stdout"),
            uris.parse_output(self.stdio.stderr, field="stderr"),
        )

    def _copy_input(self) -> None:
        if self._fifo_input is not None and self._copying is None:
            self._copying = self._background.start(self._fifo_input.copy(), name="stdin")

    def change_owner(self, uid: int, gid: int) -> None:
        """Give the process' ends of the pipes to a user, as runc's options may ask for."""
        if (uid or gid) and self._runtime_stdio is not None:
            for fd in self._theirs:
                os.fchown(fd, uid, gid)

    def _open_sinks(self, outputs: dict[str, uris.Output]) -> None:
        wanted = {
            name: spec
            for name, spec in outputs.items()
            if not isinstance(spec, (uris.Nothing, uris.Logger))
        }
        ours = [
            n for n, spec in wanted.items() if isinstance(spec, (uris.LogFile, uris.Attachable))
        ]
        if ours:
            self._open_output(wanted, ours)
        for name, spec in wanted.items():
            if name not in self._sinks:
                sharing = [other for other, spec_of in wanted.items() if spec_of == spec]
                sink = self._make_sink(spec, name, streams=len(sharing))
                self._unique_sinks.append(sink)
                self._sinks.update(dict.fromkeys(sharing, sink))
        if self._logger is not None and self.stdio.terminal:
            os.set_blocking(self._logger.stdout, False)
            self._sinks[STDOUT] = FdSink(self._logger.stdout, close=self._release)
            self._unique_sinks.append(self._sinks[STDOUT])
            os.close(self._logger.stderr)

    def _open_output(self, wanted: Mapping[str, uris.Output], ours: list[str]) -> None:
        files = {spec for spec in wanted.values() if isinstance(spec, uris.LogFile)}
        if len(files) > 1:
            raise FailedPrecondition("stdout and stderr cannot have two different log files")
        for spec in files:
            self.log = self._open_log(spec)
        self.output = Output(
            self.log,
            streams=len(ours),
            dropped=self._metrics.dropped,
            handed=self._count_handed,
        )
        self._sinks.update(dict.fromkeys(ours, self.output))
        self._unique_sinks.append(self.output)

    def _open_log(self, spec: uris.LogFile, saved: Mapping[str, Any] | None = None) -> LogWriter:
        return LogWriter(
            spec.path,
            FORMATS[spec.format](),
            max_size_bytes=spec.max_size_bytes,
            max_files=spec.max_files,
            block_on_full=spec.block_on_full,
            dropped=self._metrics.dropped,
            saved=saved,
            wrote=self._count_written,
            newlines=self._metrics.newlines,
        )

    def _unpack_sink(self, saved: Mapping[str, Any], stream: str) -> Sink:
        if saved["kind"] == "fd":
            return FdSink.unpack(saved, close=self._release)
        targets = self._parse()
        dropped = self._metrics.dropped
        if saved["kind"] == "log":
            spec = targets[stream == STDERR]
            assert isinstance(spec, uris.RawFile)
            return LogWriter(
                spec.path,
                RawFormat(),
                dropped=dropped,
                saved=saved,
                wrote=self._count_written,
                newlines=self._metrics.newlines,
            )
        if saved["log"] is not None:
            file = next(target for target in targets if isinstance(target, uris.LogFile))
            self.log = self._open_log(file, saved["log"])
        self.output = Output.unpack(saved, self.log, dropped=dropped, handed=self._count_handed)
        return self.output

    def _make_sink(self, spec: uris.Output, name: str, *, streams: int) -> Sink:
        if isinstance(spec, uris.RawFile):
            return LogWriter(
                spec.path,
                RawFormat(),
                dropped=self._metrics.dropped,
                wrote=self._count_written,
                newlines=self._metrics.newlines,
            )
        assert isinstance(spec, uris.Fifo)
        fd = open_output(spec.path, field=name)
        return FdSink(fd, streams=streams, close=self._release)

    def _open_stdin(self) -> int:
        if isinstance(self._stdin_source, uris.Nothing):
            return self._keep(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(write_end, False)
        self.input = Input(write_end, terminal=False, close=self._release, took=self._took)
        return self._keep(read_end)

    def _open_stream(self, name: str, spec: uris.Output) -> int:
        if self._logger is not None:
            return self._keep(self._logger.stdout if name == STDOUT else self._logger.stderr)
        if isinstance(spec, uris.Nothing):
            return self._keep(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read_end, False)
        self._pipes[name] = read_end
        return self._keep(write_end)

    def _keep(self, fd: int) -> int:
        self._theirs.append(fd)
        return fd

    def _close_theirs(self) -> None:
        for fd in self._theirs:
            os.close(fd)
        self._theirs.clear()

    def _add_pump(self, fd: int, stream: str, *, owns_fd: bool, paused: bool = False) -> None:
        pump = Pump(
            fd,
            stream,
            self._sinks[stream],
            read=self._count_read,
            owns_fd=owns_fd,
            close=self._release,
        )
        self._pumps.append(pump)
        if paused:
            pump.pause()
        else:
            pump.start()

    def _count_read(self, stream: str, data: bytes) -> None:
        self._metrics.read(stream, len(data))
        if not self._is_logged(stream):
            self._metrics.newlines(stream, data.count(b"\n"))
        if self._meter is not None:
            self._meter[meter.READ[stream]] += len(data)

    def _is_logged(self, stream: str) -> bool:
        """Whether a log file is written, and its newlines counted on the way."""
        sink = self._sinks[stream]
        return isinstance(sink, LogWriter) or (sink is self.output and self.log is not None)

    def _count_written(self, stream: str, count: int) -> None:
        if self._meter is not None:
            self._meter[meter.WRITTEN[stream]] = count

    def _count_handed(self, offset: int) -> None:
        if self._meter is not None:
            self._meter[meter.HANDED] = offset

    def _took(self, count: int) -> None:
        if self._meter is not None:
            self._meter[meter.TAKEN] = count


async def open_io(
    stdio: uris.Stdio,
    *,
    container_id: str,
    namespace: str,
    reaper: Reaper,
    metrics: Measures,
    background: Background,
    release: Callable[[int], None] = os.close,
) -> ProcessIo:
    """Open the streams of a process that is about to be created.

    Raises:
        InvalidArgument: a URI is malformed.
        FailedPrecondition: what it names cannot be opened.
    """
    streams = ProcessIo(stdio, metrics, background, release)
    async with AsyncExitStack() as undo:
        undo.push_async_callback(streams.close, drain=False)
        await streams.open(reaper, container_id=container_id, namespace=namespace)
        undo.pop_all()
    return streams
