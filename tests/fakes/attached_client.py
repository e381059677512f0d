"""A client of the daemon's API that is attached to a process."""

from __future__ import annotations

import grpc

from protos.theseus.engine.v1 import containers_pb2 as pb


class AttachedClient:
    """One session."""

    def __init__(self, method, **start):
        self.call = method(timeout=30)
        self._start = pb.AttachStart(**{"output": True, **start})
        self.output = b""
        self.gaps = []

    async def begin(self):
        await self.call.write(pb.AttachRequest(start=self._start))
        first = await self.call.read()
        assert first.WhichOneof("message") == "started"
        return first.started

    async def send(self, data, offset):
        await self.call.write(pb.AttachRequest(input=pb.AttachInput(offset=offset, data=data)))

    async def until(self, length):
        while len(self.output) < length:
            answer = await self.call.read()
            assert answer.WhichOneof("message") == "output"
            assert answer.output.offset == self._start.offset + len(self.output)
            self.output += answer.output.data
        return self.output

    async def rest(self):
        """Read to the end; returns the length of the whole output."""
        while (answer := await self.call.read()).WhichOneof("message") == "output":
            self.output += answer.output.data
        assert answer.WhichOneof("message") == "finished"
        assert await self.call.read() is grpc.aio.EOF
        return answer.finished.offset
