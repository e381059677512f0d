"""Debian's dockerd, asked through its HTTP API over its Unix socket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import aiohttp

from tools.bench.engines.command import MINIMAL
from tools.bench.engines.engine import CALL_S, ECHO, SAID, BenchError, Client, Plan
from tools.bench.engines.server import Server
from tools.bench.engines.theseus import API
from tools.bench.figures import Role, Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.bench.pictures import Pictures

_VERSION = "v1.41"
_STOP_S = 10
_FRAME_BYTES = 8
"""Header of a chunk of output: stream, three zeros, length."""


async def version(socket: Path) -> str:
    """What dockerd says it is, over a connection of its own."""
    async with _session(socket) as session:
        return str((await _call(session, "GET", "/version"))["Version"])


class Dockerd:
    """dockerd with the containerd that it starts for itself."""

    subject: ClassVar = Subject("dockerd", Role.PEER)
    api: ClassVar = API
    networks: ClassVar[tuple[str, ...]] = ("none", "bridge")

    def __init__(self, place: Path, pictures: Pictures) -> None:
        self.place = place
        self._image = pictures.reference(pictures.busybox_name)
        self.servers: tuple[Server, ...] = (_server(place),)
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Start it."""
        await self.servers[0].start()

    async def close(self) -> None:
        """End it."""
        await self.forget()
        await self.servers[0].stop()

    async def forget(self) -> None:
        """Close the connections; the next call makes new ones."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def pull(self, reference: str) -> None:
        """See Engine."""
        name, _, tag = reference.rpartition(":")
        path = f"/{_VERSION}/images/create"
        query = {"fromImage": name, "tag": tag}
        async with self._calls.post(f"http://docker{path}", params=query) as answer:
            if answer.status != 200:
                raise BenchError(f"pull: {answer.status} {await answer.text()}")
            async for line in answer.content:
                if failure := json.loads(line).get("error"):
                    raise BenchError(f"pull: {failure}")

    async def remove_image(self, reference: str) -> None:
        """See Engine."""
        await self._ask("DELETE", f"/images/{reference}")

    async def run(self, plan: Plan) -> int:
        """See Engine. The wait's headers come once it is registered."""
        container = await self.create(plan)
        url = f"http://docker/{_VERSION}/containers/{container}/wait?condition=next-exit"
        async with self._calls.post(url) as waiting:
            await self.begin(container)
            code = int((await waiting.json())["StatusCode"])
        await self.remove(container)
        return code

    async def record(self, plan: Plan) -> str:
        """See Engine."""
        return await self.create(plan)

    async def discard(self, container: str) -> None:
        """See Engine."""
        await self.remove(container)

    async def create(self, plan: Plan) -> str:
        """See Engine."""
        binds = [f"{source}:{target}:ro" for source, target in (plan.binds or {}).items()]
        body = {
            "Image": plan.picture or self._image,
            "Cmd": list(plan.command),
            "HostConfig": {"NetworkMode": plan.network, "Runtime": plan.runtime, "Binds": binds},
        }
        return str((await self._ask("POST", "/containers/create", body))["Id"])

    async def begin(self, container: str) -> None:
        """See Engine."""
        await self._ask("POST", f"/containers/{container}/start")

    async def wait(self, container: str) -> int:
        """See Engine."""
        return int((await self._ask("POST", f"/containers/{container}/wait"))["StatusCode"])

    async def execute(self, container: str) -> int:
        """See Engine."""
        body = {"Cmd": list(ECHO), "AttachStdout": True, "AttachStderr": True}
        exec_id = (await self._ask("POST", f"/containers/{container}/exec", body))["Id"]
        url = f"http://docker/{_VERSION}/exec/{exec_id}/start"
        async with self._calls.post(url, json={"Detach": False, "Tty": False}) as answer:
            said = await answer.read()
        if answer.status != 200 or said[_FRAME_BYTES:] != SAID:
            raise BenchError(f"exec: {answer.status} {said!r}")
        return int((await self._ask("GET", f"/exec/{exec_id}/json"))["ExitCode"])

    async def stop(self, container: str) -> int:
        """See Engine."""
        await self._ask("POST", f"/containers/{container}/stop?t={_STOP_S}")
        return int((await self._get(container))["State"]["ExitCode"])

    async def remove(self, container: str) -> None:
        """See Engine."""
        await self._ask("DELETE", f"/containers/{container}")

    async def destroy(self, container: str) -> None:
        """See Engine."""
        await self._ask("DELETE", f"/containers/{container}?force=1")

    async def count(self) -> int:
        """See Engine."""
        return len(await self._list())

    async def running(self) -> int:
        """See Engine."""
        return sum(container["State"] == "running" for container in await self._list())

    async def inspect(self, container: str) -> None:
        """See Engine."""
        if (found := (await self._get(container))["Id"]) != container:
            raise BenchError(f"asked for {container}, got {found}")

    async def log_path(self, container: str) -> Path:
        """See Engine."""
        return Path((await self._get(container))["LogPath"])

    async def version(self) -> str:
        """See Engine."""
        return await version(self.servers[0].address)

    def client(self) -> Client | None:
        """See Engine. Debian's, whatever else is on the path."""
        docker = "/usr/bin/docker"
        return Client("docker", [docker], [docker, "-H", f"unix://{self.servers[0].address}", "ps"])

    def tier(self, pid: int, argv: Sequence[str]) -> str:
        """See Engine."""
        del pid
        name = Path(argv[0]).name
        return "daemon" if name == "dockerd" else "shim" if "shim" in name else "containerd"

    @property
    def _calls(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = _session(self.servers[0].address)
        return self._session

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        return await _call(self._calls, method, f"/{_VERSION}{path}", body)

    async def _get(self, container: str) -> Any:
        return await self._ask("GET", f"/containers/{container}/json")

    async def _list(self) -> Any:
        return await self._ask("GET", "/containers/json?all=1")


def _server(place: Path) -> Server:
    state = place / "state"
    state.mkdir()
    address = place / "docker.sock"
    return Server(
        "daemon",
        [
            "dockerd",
            *("--data-root", str(place / "root" / "docker"), "--exec-root", str(state)),
            *("--pidfile", str(place / "pid"), "--host", f"unix://{address}"),
            *("--add-runtime", "crun=/usr/bin/crun", "--live-restore"),
        ],
        address=address,
        answers=version,
        log=place / "dockerd.log",
        environment=MINIMAL,
    )


def _session(socket: Path) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(str(socket)),
        timeout=aiohttp.ClientTimeout(total=CALL_S),
    )


async def _call(session: aiohttp.ClientSession, method: str, path: str, body: object = None) -> Any:
    async with session.request(method, f"http://docker{path}", json=body) as answer:
        if answer.status >= 400:
            raise BenchError(f"{method} {path}: {answer.status} {await answer.text()}")
        if answer.content_type != "application/json":
            return None
        return await answer.json()
