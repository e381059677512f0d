"""A fake containerd as shims see it: the Registry service, with a journal in a file.

It is served over ttrpc beside the socket that shims are told, or over gRPC there if it is to be an
older one. In a test's own process: ``FakeRegistry``. As a program, to be SIGKILLed:
``python registry_server.py SOCKET JOURNAL EPOCH``; it prints a line once it serves.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc

from protos.containerd.events import task_pb2
from protos.theseus.shim.v1 import registry_pb2, registry_pb2_grpc
from services.common.metrics import ServerMetrics
from services.common.server import Methods
from services.common.sockets import listen
from services.common.ttrpc.server import TtrpcServer
from services.common.ttrpc_handlers import Handlers

MESSAGES = {
    f"containerd.events.{name}": getattr(task_pb2, name)
    for name in (
        "TaskCreate",
        "TaskStart",
        "TaskExit",
        "TaskDelete",
        "TaskOOM",
        "TaskExecAdded",
        "TaskExecStarted",
        "TaskPaused",
        "TaskResumed",
        "TaskCheckpointed",
    )
} | {"theseus.shim.v1.ProcessState": registry_pb2.ProcessState}

OLDER = False
"""Whether those that are made are older ones; a test may set it."""


@dataclass
class Received:
    """One journaled event."""

    instance: str
    seq: int
    topic: str
    message: object


@dataclass
class FakeRegistry(registry_pb2_grpc.RegistryServicer):
    """Journals events once each, acknowledges them, and lets a test look and wait."""

    socket: Path
    epoch: int = 1
    acknowledge: bool = True
    journal: Path | None = None
    older: bool = field(default_factory=lambda: OLDER)
    hellos: list = field(default_factory=list)
    events: list = field(default_factory=list)
    raw_count: int = 0
    server: object = None

    def __post_init__(self):
        self._changed = asyncio.Condition()
        self._calls = set()

    async def start(self):
        self.socket.parent.mkdir(parents=True, exist_ok=True)
        if self.older:
            self.server = grpc.aio.server()
            registry_pb2_grpc.add_RegistryServicer_to_server(self, self.server)
            new = self.socket.with_name(self.socket.name + ".new")
            self.server.add_insecure_port(f"unix:{new}")
            await self.server.start()
            new.rename(self.socket)
            return
        methods = Methods(ServerMetrics())
        registry_pb2_grpc.add_RegistryServicer_to_server(self, methods)
        new = self._path.with_name("ttrpc.new")
        self.server = TtrpcServer(Handlers(methods).answer)
        await self.server.start(listen(new, mode=0o600, backlog=128))
        new.rename(self._path)
        new.touch()  # containerd's main socket comes last, and is what a shim watches for
        new.rename(self.socket)

    async def stop(self):
        self._path.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)
        await self.server.stop(0)

    @property
    def _path(self):
        return self.socket if self.older else self.socket.with_name(f"{self.socket.name}.ttrpc")

    async def Register(self, request_iterator, context):
        first = await anext(request_iterator)
        hello = first.hello
        self.hellos.append(hello)
        await self._notify()
        yield registry_pb2.RegisterResponse(
            welcome=registry_pb2.Welcome(
                containerd_id=f"fake-{self.epoch}",
                epoch=self.epoch,
                last_acked_seq=self._last_seq(hello.instance_id),
                protocol=1,
            )
        )
        async for request in request_iterator:
            event = request.event
            self.raw_count += 1
            if event.seq > self._last_seq(hello.instance_id):
                self._keep(hello.instance_id, event)
            await self._notify()
            if self.acknowledge:
                yield registry_pb2.RegisterResponse(ack=registry_pb2.Ack(seq=event.seq))

    async def wait_for(self, predicate, limit_s=10):
        """Wait until ``predicate(self)`` holds."""
        async with asyncio.timeout(limit_s), self._changed:
            await self._changed.wait_for(lambda: predicate(self))

    async def wait_for_topic(self, topic, count=1):
        """Wait for ``count`` events of a topic; returns the last one's message."""
        await self.wait_for(lambda r: len(r.of(topic)) >= count)
        return self.of(topic)[count - 1].message

    def of(self, topic):
        """Events of one topic."""
        return [event for event in self.events if event.topic == topic]

    def topics(self):
        """Topics in order."""
        return [event.topic for event in self.events]

    def _last_seq(self, instance):
        return max((e.seq for e in self.events if e.instance == instance), default=0)

    def _keep(self, instance, event):
        assert event.event.type_url in MESSAGES
        message = MESSAGES[event.event.type_url].FromString(event.event.value)
        self.events.append(Received(instance, event.seq, event.topic, message))
        if self.journal is not None:
            with self.journal.open("a") as file:
                status = getattr(message, "exit_status", None)
                line = {"instance": instance, "seq": event.seq, "topic": event.topic}
                file.write(json.dumps({**line, "exit_status": status}) + "\n")

    async def _notify(self):
        async with self._changed:
            self._changed.notify_all()


async def main(socket, journal, epoch):
    registry = FakeRegistry(Path(socket), epoch=int(epoch), journal=Path(journal))
    if registry.journal.exists():
        for line in registry.journal.read_text().splitlines():
            entry = json.loads(line)
            registry.events.append(Received(entry["instance"], entry["seq"], entry["topic"], None))
    await registry.start()
    sys.stdout.write("serving\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
