"""The runtimes alone: what no engine that uses them can be faster than."""

from __future__ import annotations

import json
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING

from tools.bench.engines.command import MINIMAL, output
from tools.bench.engines.engine import IDLE, BenchError, Plan
from tools.bench.engines.spec import specification
from tools.bench.figures import Role, Subject

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tools.image import Image


class Bare:
    """Bundles below ``place``, and runc or crun on them."""

    subject = Subject("bare runtime", Role.LIMIT)

    def __init__(self, place: Path, picture: Image) -> None:
        self._rootfs = place / "root" / "rootfs"
        self._rootfs.mkdir()
        layer = place / "layer.tar"
        layer.write_bytes(picture.layers[0])
        with tarfile.open(layer) as archive:
            archive.extractall(self._rootfs, filter="fully_trusted")
        self._true = self._bundle(place / "root" / "true", Plan())
        self._idle = self._bundle(place / "root" / "idle", Plan(command=IDLE))

    async def run(self, runtime: str) -> None:
        """Create, start, delete. The command ends well before it is deleted by force, or not."""
        name = f"bench-{time.monotonic_ns()}"
        _call(runtime, "create", "--bundle", str(self._true), name)
        _call(runtime, "start", name)
        _call(runtime, "delete", "--force", name)

    async def create(self, runtime: str) -> str:
        """Create one that idles; returns its name."""
        name = f"bench-{time.monotonic_ns()}"
        _call(runtime, "create", "--bundle", str(self._idle), name)
        return name

    async def begin(self, runtime: str, name: str) -> None:
        """Start it."""
        _call(runtime, "start", name)

    async def execute(self, runtime: str, name: str, command: Sequence[str]) -> None:
        """Run another command in it."""
        said = await output(runtime, "exec", name, *command)
        if said != "ok\n":
            raise BenchError(f"{runtime} exec: said {said!r}")

    async def delete(self, runtime: str, name: str) -> None:
        """Kill and delete it."""
        _call(runtime, "delete", "--force", name)

    def _bundle(self, directory: Path, plan: Plan) -> Path:
        directory.mkdir()
        spec = specification(plan)
        spec["root"] = {"path": str(self._rootfs)}
        (directory / "config.json").write_text(json.dumps(spec))
        return directory


def _call(*command: str) -> None:
    # Of its output nothing may be a pipe: the container would hold that open.
    null = subprocess.DEVNULL
    code = subprocess.run(
        command, stdin=null, stdout=null, stderr=null, check=False, env=MINIMAL
    ).returncode
    if code:
        raise BenchError(f"{' '.join(command)}: exit code {code}")
