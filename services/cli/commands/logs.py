"""``logs``."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli import values
from services.cli.commands import Command
from services.cli.engine import LONG_DEADLINE_S, Patience
from services.cli.parser import UsageError
from services.common.errors import Cancelled, DeadlineExceeded, Unavailable

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.engine import Engine
    from services.cli.parser import Parser


def _arguments(parser: Parser) -> None:
    parser.flag("-f", "--follow", help="go on with what comes, until the container ends")
    parser.flag("-t", "--timestamps", help="print when each line was written")
    parser.option("-n", "--tail", metavar="N", default="all", help="only the last N lines")
    when = "only what came {}; a time, or how long ago such as 10m"
    parser.option("--since", metavar="TIME", help=when.format("after"))
    parser.option("--until", metavar="TIME", help=when.format("before"))
    parser.words("containers", at_least=1, at_most=1)


async def _logs(engine: Engine, options: Namespace) -> int:
    request = pb.LogsRequest(
        container=options.containers[0], follow=options.follow, stdout=True, stderr=True
    )
    if options.tail != "all":
        lines = values.number(options.tail, "--tail")
        if lines >= 0:  # docker's -1 is all
            request.tail = lines
    for name in ("since", "until"):
        if text := getattr(options, name):
            getattr(request, name).CopyFrom(_point_in_time(text))
    if request.HasField("tail") and request.tail == 0:
        # As a time it means the same, and goes on meaning it after a restart of the engine.
        request.ClearField("tail")
        request.since.GetCurrentTime()
    await _Printer(engine, request, timestamps=options.timestamps).run()
    return 0


class _Printer:
    """Prints what a request gives; after a restart of the engine it goes on at the same byte."""

    def __init__(self, engine: Engine, request: pb.LogsRequest, *, timestamps: bool) -> None:
        self._engine = engine
        self._request = request
        self._timestamps = timestamps
        self._line_open: dict[int, bool] = {}
        self._patience = Patience()
        self._accepted = self._got_any = False

    async def run(self) -> None:
        while True:
            try:
                with self._engine.failures():
                    call = self._engine.containers.Logs(self._request, timeout=LONG_DEADLINE_S)
                    await call.initial_metadata()
                    self._accepted |= not call.done()
                    async for response in call:
                        self._patience.reset()
                        for entry in response.entries:
                            self._print(entry)
                return
            except DeadlineExceeded:
                continue
            except (Unavailable, Cancelled) as error:
                if not self._accepted:
                    raise
                await self._patience.pause(error)

    def _print(self, entry: pb.LogEntry) -> None:
        if not self._got_any and self._request.HasField("tail"):
            # The last lines of a log that has grown are other lines: from now on count from here.
            self._request.ClearField("tail")
            self._request.since.CopyFrom(entry.timestamp)
        self._got_any = True
        data = entry.data
        if self._timestamps and not self._line_open.get(entry.stream, False):
            data = f"{entry.timestamp.ToJsonString()} ".encode() + data
        self._line_open[entry.stream] = not entry.data.endswith(b"\n")
        fd = 2 if entry.stream == pb.STREAM_KIND_STDERR else 1
        while data:
            data = data[os.write(fd, data) :]
        self._request.offset += len(entry.data)


def _point_in_time(text: str) -> Timestamp:
    result = Timestamp()
    try:
        if "-" in text[1:]:  # a date
            moment = datetime.fromisoformat(text)
            result.FromDatetime(moment.astimezone(UTC).replace(tzinfo=None))
        elif text.replace(".", "", 1).isdigit():
            result.FromNanoseconds(int(float(text) * 1e9))
        else:
            ago = values.seconds(text)
            result.FromNanoseconds(time.time_ns() - int(ago * 10**9))
    except (ValueError, OverflowError):
        raise UsageError(f"'{text}' is not a time: write 2024-01-31T12:00:00Z or 10m") from None
    return result


COMMANDS = {"logs": Command(_arguments, _logs)}
