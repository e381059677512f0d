"""``theseus.journal.v1.Journal``: every event of the node, from a sequence number on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.journal.v1 import journal_pb2 as pb
from protos.theseus.journal.v1 import journal_pb2_grpc
from services.containerd.events.journal import Truncated
from services.containerd.rpc.encoding import timestamp, to_any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.containerd.events.journal import Journal
    from services.containerd.rpc.context import Context


FIRST_SEQ_KEY = "theseus-first-seq"
"""Trailing metadata of OUT_OF_RANGE: the first event that is left."""

_PASSED_OVER_MAX = 64


class JournalService(journal_pb2_grpc.JournalServicer):
    """Serves the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def Read(
        self, request: pb.ReadRequest, context: Context
    ) -> AsyncIterator[pb.ReadResponse]:
        """See the contract."""
        from_seq = getattr(request, "from")
        if request.from_end:
            from_seq = await self._journal.last_seq() + 1
            yield pb.ReadResponse(next_seq=from_seq)
        entries = self._journal.read(
            from_seq, namespace=request.namespace, follow=not request.no_follow
        )
        wanted = frozenset(request.topics)
        passed_over, next_seq = 0, from_seq
        try:
            async for entry in entries:
                next_seq = entry.seq + 1
                if wanted and entry.topic not in wanted:
                    passed_over += 1
                    if passed_over == _PASSED_OVER_MAX:
                        passed_over = 0
                        yield pb.ReadResponse(next_seq=next_seq)
                    continue
                passed_over = 0
                yield pb.ReadResponse(
                    entry=pb.Entry(
                        seq=entry.seq,
                        timestamp=timestamp(entry.timestamp_ns),
                        namespace=entry.namespace,
                        topic=entry.topic,
                        event=to_any(entry.event),
                    ),
                    next_seq=next_seq,
                )
            if passed_over:
                yield pb.ReadResponse(next_seq=next_seq)
        except Truncated as error:
            context.set_trailing_metadata(((FIRST_SEQ_KEY, str(error.first_seq)),))
            raise
