"""``theseus-containerd --address SOCKET publish``: an event of a shim without a connection.

Upstream's shims know the program by ``-publish-binary``. The event is a ``google.protobuf.Any`` on
standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from protos.containerd.services.events.v1 import events_pb2, events_pb2_grpc
from services.common import program
from services.common.client import connect
from services.common.errors import InvalidArgument
from services.common.rpc_errors import translated

if TYPE_CHECKING:
    from collections.abc import Sequence

_EVENT_MAX_BYTES = 4 << 20
_CALL_S = 10.0


def main(arguments: Sequence[str]) -> int:
    """Publish; returns the exit status."""
    parser = argparse.ArgumentParser(prog="theseus-containerd", description=__doc__)
    parser.add_argument("--address", type=Path, required=True, metavar="SOCKET")
    parser.add_argument("publish", choices=["publish"])
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--topic", required=True)
    given = parser.parse_args(arguments)
    return program.run(
        "theseus-containerd publish",
        lambda: asyncio.run(
            _publish(given.address, given.namespace, given.topic, sys.stdin.buffer.read())
        ),
    )


async def _publish(address: Path, namespace: str, topic: str, data: bytes) -> None:
    try:
        if not data or len(data) > _EVENT_MAX_BYTES:
            raise DecodeError
        event = AnyMessage.FromString(data)
    except DecodeError as error:
        raise InvalidArgument(
            f"{len(data)} bytes on standard input are no google.protobuf.Any"
        ) from error
    async with connect(address, namespace=namespace) as channel:
        request = events_pb2.PublishRequest(topic=topic, event=event)
        with translated():
            await events_pb2_grpc.EventsStub(channel).Publish(request, timeout=_CALL_S)
