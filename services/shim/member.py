"""A bundle that a shim serves: all that a shim is to containerd, but for the process.

A process serves one, or those of a whole group. Each has an id, an instance, a spool, a place with
the keeper, a state file and a registration of its own, as if it were alone. So containerd follows
each on its own, and each can be taken over on its own by another process, should this one die.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from services.shim.bundle import Bundle
from services.shim.clients.registry import RegistryClient
from services.shim.home import Home
from services.shim.keeping import Keeping
from services.shim.legacy import read_legacy
from services.shim.spool import Spool
from services.shim.surroundings import Surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from protos.theseus.shim.v1 import registry_pb2
    from services.common.background import Background
    from services.shim.config import ShimConfig
    from services.shim.metrics import ShimMetrics
    from services.shim.reaper import Reaper

    Greeting = Callable[["Member"], registry_pb2.Hello]

_AGAIN_S = 0.5


class Member:
    """One bundle of a shim.

    Args:
        config: names it; what concerns the process is the same for all members.
        metrics: of the process.
        reaper: of the process.
        background: owns the registration.
        hello: makes its Hello of this moment.
        epoch_seen: called when its home's epoch has changed, to keep it.

    Attributes:
        fresh: it waits for its container, and never had one.
    """

    def __init__(
        self,
        config: ShimConfig,
        *,
        metrics: ShimMetrics,
        reaper: Reaper,
        background: Background,
        hello: Greeting,
        epoch_seen: Callable[[Member], None],
    ) -> None:
        self.config = config
        self.fresh = True
        self._metrics = metrics
        self._epoch_seen = epoch_seen
        self._background = background
        self._registration: asyncio.Task[None] | None = None
        bundle = Bundle(config.bundle)
        self.spool = Spool(bundle.spool, write_failed=metrics.spool_failures.inc)
        self.keeping = Keeping(config.keeper, config.instance_id)
        self.home = Home(
            bundle,
            Surroundings(
                namespace=config.namespace,
                reaper=reaper,
                events=self.spool,
                metrics=metrics,
                background=background,
                keeping=self.keeping,
                forgets_behind=True,
            ),
        )
        self.registry = RegistryClient(
            config.registry,
            hello=lambda: hello(self),
            spool=self.spool,
            metrics=metrics,
            epoch=self.home.epoch,
            epoch_seen=self._keep_epoch,
            crowd=config.socket.parent,
        )

    async def read_legacy(self) -> dict[str, Any]:
        """What a dead process has left of this member; see ``legacy.py``."""
        return await read_legacy(self.home.bundle, self.keeping, self._metrics.dropped)

    def register(self) -> None:
        """Register, and stay registered until ``leave``, or the end of the process."""
        self._registration = self._background.start(
            self.registry.run(), name=f"registry {self.config.id}"
        )

    async def leave(self) -> None:
        """Be a member no more: nothing of it is kept, nobody is told of it."""
        while self._registration is not None and not self._registration.done():
            self._registration.cancel()  # grpc.aio may lose one, towards an older containerd
            await asyncio.wait({self._registration}, timeout=_AGAIN_S)
        self.keeping.forget_all()
        self.keeping.close()

    def write_identity(self, identity: Mapping[str, object]) -> None:
        """Say in the bundle which process serves it."""
        config, bundle = self.config, self.home.bundle
        bundle.write(
            "shim.json",
            {
                **bundle.read("shim.json"),
                "instance_id": config.instance_id,
                "namespace": config.namespace,
                "id": config.id,
                "socket": str(config.socket),
                **identity,
            },
        )

    def pack(self) -> dict[str, Any]:
        """What the next image of the process has to know of it."""
        return {
            "config": self.config.to_request(),
            "spool": self.spool.pack(),
            "keeping": self.keeping.pack(),
            "fresh": self.fresh,
        }

    def unpack(self, saved: Mapping[str, Any]) -> None:
        """Go on where an earlier image was."""
        self.spool.unpack(saved["spool"])
        self.keeping.unpack(saved["keeping"])
        self.fresh = saved.get("fresh", False)

    def _keep_epoch(self, epoch: int) -> None:
        self.home.epoch = epoch
        self._epoch_seen(self)
