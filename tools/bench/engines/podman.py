"""Debian's podman. It has no server: its API is its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tools.bench.engines.command import finished, output
from tools.bench.engines.engine import ECHO, SAID, BenchError, Client, Plan
from tools.bench.engines.theseus import API
from tools.bench.figures import Role, Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.bench.engines.server import Server
    from tools.bench.pictures import Pictures

_STOP_S = 10


class Podman:
    """podman by its command line."""

    subject: ClassVar = Subject("podman", Role.PEER)
    api: ClassVar = API
    networks: ClassVar[tuple[str, ...]] = ("none", "bridge")

    def __init__(self, place: Path, pictures: Pictures) -> None:
        self.place = place
        self._image = pictures.reference(pictures.busybox_name)
        self.servers: tuple[Server, ...] = ()
        state = place / "state"
        self.command = (
            "podman",
            *("--root", str(place / "root" / "storage"), "--runroot", str(state)),
            *("--tmpdir", str(state / "tmp"), "--network-config-dir", str(state / "networks")),
            *("--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"),
            *("--events-backend", "file"),
        )

    async def start(self) -> None:
        """Nothing has to run."""

    async def close(self) -> None:
        """Nothing runs."""

    async def forget(self) -> None:
        """There is no connection."""

    async def pull(self, reference: str) -> None:
        """See Engine."""
        await self._podman("pull", "--quiet", "--tls-verify=false", reference)

    async def remove_image(self, reference: str) -> None:
        """See Engine."""
        await self._podman("rmi", reference)

    async def run(self, plan: Plan) -> int:
        """See Engine."""
        done = await finished([*self.command, *self._words("run", plan, "--rm")])
        if done.returncode:
            raise BenchError(f"podman run: exit code {done.returncode}: {done.stderr}")
        return done.returncode

    async def record(self, plan: Plan) -> str:
        """See Engine."""
        return await self.create(plan)

    async def discard(self, container: str) -> None:
        """See Engine."""
        await self.remove(container)

    async def create(self, plan: Plan) -> str:
        """See Engine."""
        return (await self._podman(*self._words("create", plan))).strip()

    async def begin(self, container: str) -> None:
        """See Engine."""
        await self._podman("start", container)

    async def wait(self, container: str) -> int:
        """See Engine."""
        return int(await self._podman("wait", "--interval", "1ms", container))

    async def execute(self, container: str) -> int:
        """See Engine."""
        if (said := await self._podman("exec", container, *ECHO)).encode() != SAID:
            raise BenchError(f"exec said {said!r}")
        return 0

    async def stop(self, container: str) -> int:
        """See Engine."""
        await self._podman("stop", "-t", str(_STOP_S), container)
        return int(await self._podman("inspect", "-f", "{{.State.ExitCode}}", container))

    async def remove(self, container: str) -> None:
        """See Engine."""
        await self._podman("rm", container)

    async def destroy(self, container: str) -> None:
        """See Engine."""
        await self._podman("rm", "-f", "-t", "0", container)

    async def count(self) -> int:
        """See Engine."""
        return len((await self._podman("ps", "-a", "-q")).split())

    async def running(self) -> int:
        """See Engine."""
        return len((await self._podman("ps", "-q")).split())

    async def inspect(self, container: str) -> None:
        """See Engine."""
        found = json.loads(await self._podman("inspect", container))[0]["Id"]
        if found != container:
            raise BenchError(f"asked for {container}, got {found}")

    async def log_path(self, container: str) -> Path:
        """See Engine."""
        template = "{{.HostConfig.LogConfig.Path}}"
        return Path((await self._podman("inspect", "-f", template, container)).strip())

    async def version(self) -> str:
        """See Engine."""
        return (await output("podman", "--version")).split()[-1]

    def client(self) -> Client | None:
        """See Engine."""
        return Client("podman", ["podman"], [*self.command, "ps"])

    def tier(self, pid: int, argv: Sequence[str]) -> str:
        """See Engine."""
        del pid
        return "shim" if Path(argv[0]).name == "conmon" else "daemon"

    async def _podman(self, *arguments: str) -> str:
        return await output(*self.command, *arguments)

    def _words(self, verb: str, plan: Plan, *options: str) -> list[str]:
        binds = [f"{source}:{target}:ro" for source, target in (plan.binds or {}).items()]
        return [
            *("--runtime", plan.runtime, verb, *options, "--network", plan.network),
            *(word for bind in binds for word in ("--volume", bind)),
            *(plan.picture or self._image, *plan.command),
        ]
