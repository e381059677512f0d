"""Starting a container exactly once, although the engine may go away while it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli.engine import Patience
from services.common.errors import Cancelled, Unavailable

if TYPE_CHECKING:
    from services.cli.engine import Engine


async def start_once(engine: Engine, container: str) -> None:
    """Start ``container``; asked again only when the engine returns and says that it never ran.

    Raises:
        TheseusError: the engine refused, or stays away.
    """
    patience = Patience()
    while True:
        try:
            await engine.call(
                engine.containers.Start, pb.StartContainerRequest(container=container)
            )
            return
        except (Unavailable, Cancelled) as error:
            await patience.pause(error)
        while True:
            try:
                request = pb.GetContainerRequest(container=container)
                found = (await engine.call(engine.containers.Get, request)).container
                break
            except (Unavailable, Cancelled) as error:
                await patience.pause(error)
        if found.HasField("started_at") or found.state != pb.CONTAINER_STATE_CREATED:
            return
