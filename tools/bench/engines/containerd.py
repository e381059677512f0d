"""Two containerds, asked by the same calls: Theseus' and Debian's."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tools.bench import memory
from tools.bench.engines import containerd_api
from tools.bench.engines.command import MINIMAL, output
from tools.bench.engines.containerd_api import ContainerdApi
from tools.bench.engines.engine import TRUE, Client, Plan
from tools.bench.engines.server import Server
from tools.bench.figures import Role, Subject
from tools.bench.pictures import chain_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.bench.pictures import Pictures

API = "containerd's"
_INIT = 1
_WAITING = "theseus-waiting"
METRICS = "metrics.sock"
"""Below the state directory of Theseus' tiers."""

_CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{address}"
"""


class _Containerd:
    """What both have in common: all but the program."""

    api: ClassVar = API
    networks: ClassVar[tuple[str, ...]] = ("none",)

    def __init__(self, place: Path, pictures: Pictures) -> None:
        self.place = place
        self._pictures = pictures
        self._output = place / "root" / "output.log"
        """On the disk, where daemons keep their logs."""
        self.servers: tuple[Server, ...] = (self._server(place),)
        self._api: ContainerdApi | None = None
        self._parents: dict[str, str] = {}

    def _server(self, place: Path) -> Server:
        raise NotImplementedError

    @property
    def calls(self) -> ContainerdApi:
        """The calls, over a channel that is kept."""
        if self._api is None:
            self._api = ContainerdApi(self.servers[0].address)
        return self._api

    async def start(self) -> None:
        """Start containerd."""
        await self.servers[0].start()

    async def close(self) -> None:
        """End it."""
        await self.forget()
        await self.servers[0].stop()

    async def forget(self) -> None:
        """Close the channel; the next call makes a new one."""
        if self._api is not None:
            await self._api.close()
            self._api = None

    async def pull(self, reference: str) -> None:
        """By ctr, which fetches and has containerd unpack; Debian's has no other way."""
        await self.ctr("images", "pull", "--plain-http", reference)

    async def ctr(self, *arguments: str) -> str:
        """What containerd's command line client prints."""
        address = str(self.servers[0].address)
        return await output("ctr", "-a", address, "-n", containerd_api.NAMESPACE, *arguments)

    async def remove_image(self, reference: str) -> None:
        """Remove an image."""
        await self.calls.remove_image(reference)

    async def run(self, plan: Plan) -> int:
        """See Engine."""
        return await self.calls.run(plan, parent=self._parent(plan))

    async def record(self, plan: Plan) -> str:
        """See Engine."""
        return await self.calls.record(plan)

    async def discard(self, container: str) -> None:
        """See Engine."""
        await self.calls.delete_record(container)

    async def create(self, plan: Plan) -> str:
        """See Engine."""
        target = f"file://{self._output}" if plan.log else ""
        return await self.calls.create(plan, parent=self._parent(plan), output=target)

    async def begin(self, container: str) -> None:
        """See Engine."""
        await self.calls.start(container)

    async def wait(self, container: str) -> int:
        """See Engine."""
        return await self.calls.wait(container)

    async def execute(self, container: str) -> int:
        """See Engine."""
        return await self.calls.execute(container, TRUE)

    async def stop(self, container: str) -> int:
        """See Engine."""
        await self.calls.kill(container, signal.SIGTERM)
        return await self.calls.wait(container)

    async def remove(self, container: str) -> None:
        """See Engine."""
        await self.calls.remove(container)

    async def destroy(self, container: str) -> None:
        """See Engine."""
        await self.calls.kill(container, signal.SIGKILL)
        await self.calls.wait(container)
        await self.calls.remove(container)

    async def count(self) -> int:
        """See Engine."""
        return await self.calls.containers()

    async def running(self) -> int:
        """See Engine."""
        return await self.calls.running()

    async def inspect(self, container: str) -> None:
        """See Engine."""
        await self.calls.inspect(container)

    async def log_path(self, container: str) -> Path:
        """See Engine."""
        del container
        return self._output

    async def version(self) -> str:
        """See Engine."""
        return await containerd_api.version(self.servers[0].address)

    def _parent(self, plan: Plan) -> str:
        """The snapshot that is the top of an image: a client computes it from the image."""
        reference = plan.picture or self._pictures.reference(self._pictures.busybox_name)
        if reference not in self._parents:
            self._parents[reference] = chain_id(self._pictures.picture(reference))
        return self._parents[reference]


class TheseusContainerd(_Containerd):
    """Theseus' middle tier, alone."""

    subject: ClassVar = Subject("Theseus", Role.OURS)

    def _server(self, place: Path) -> Server:
        return theseus_containerd(place, place / "root", place / "state")

    def client(self) -> Client | None:
        """It has none of its own."""
        return None

    def tier(self, pid: int, argv: Sequence[str]) -> str:
        """See Engine."""
        return theseus_tier(pid, argv)


class DebianContainerd(_Containerd):
    """Debian's package, with the plugins off that dockerd turns off too."""

    subject: ClassVar = Subject("containerd", Role.PEER)

    def _server(self, place: Path) -> Server:
        config, address = place / "config.toml", place / "containerd.sock"
        config.write_text(
            _CONFIG.format(
                root=place / "root" / "containerd", state=place / "state", address=address
            )
        )
        return Server(
            "containerd",
            ["containerd", "--config", str(config)],
            address=address,
            answers=containerd_api.version,
            log=place / "containerd.log",
            environment=MINIMAL,
        )

    def client(self) -> Client | None:
        """See Engine."""
        listing = ["ctr", "-a", str(self.servers[0].address), "containers", "list"]
        return Client("ctr", ["ctr"], listing)

    def tier(self, pid: int, argv: Sequence[str]) -> str:
        """See Engine."""
        del pid
        return "shim" if "shim" in Path(argv[0]).name else "containerd"


def theseus_containerd(place: Path, root: Path, state: Path, *options: str) -> Server:
    """Theseus' containerd on these directories, with further options."""
    return Server(
        "containerd",
        [
            *(sys.executable, "-m", "services.containerd"),
            *("--root", str(root), "--state", str(state)),
            *("--metrics-address", f"unix:{state / METRICS}"),
            *options,
        ],
        address=state / "containerd.sock",
        answers=containerd_api.version,
        log=place / "containerd.log",
    )


def theseus_tier(pid: int, argv: Sequence[str]) -> str:
    """Which tier a process of Theseus belongs to, if not to the daemon.

    A shim is a fork of the factory and has its command line; the factory may be gone by now. The
    factory, shims that wait for a container, the keeper of descriptors and the unpackers are
    containerd's.
    """
    if "factory" not in argv or memory.name(pid) == _WAITING:
        return "containerd"
    above = memory.parent(pid)
    forked = above == _INIT or "factory" in memory.command(above)
    return "shim" if forked else "containerd"
