"""The OCI runtimes of the configuration: which there are, and which can be used here."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger(__name__)

_CGROUPS = Path("/sys/fs/cgroup")
_VERSION_TIMEOUT_S = 10.0


@frozen
class OciRuntime:
    """One runtime. ``reason`` says why it is not usable; ``version`` is its first line."""

    name: str
    path: str
    version: str = ""
    reason: str = ""

    @property
    def usable(self) -> bool:
        """Whether containers can be run with it."""
        return not self.reason


class OciRuntimes:
    """The runtimes by name.

    Args:
        programs: name -> path, or name to be found on PATH.
        default: name of the one used when nothing is asked for.
        cgroups: where the control groups are mounted.
    """

    def __init__(
        self, programs: Mapping[str, str], default: str, *, cgroups: Path = _CGROUPS
    ) -> None:
        self.default = default
        self._programs = programs
        self._cgroups = cgroups
        self._found: dict[str, OciRuntime] = {}

    async def probe(self) -> None:
        """Find out which can be used; call once, at start. Each is asked for its version."""
        found = await asyncio.gather(
            *(self._probe(name, path) for name, path in self._programs.items())
        )
        self._found = {runtime.name: runtime for runtime in found}
        for runtime in found:
            if not runtime.usable:
                log.warning("runtime unusable", runtime=runtime.name, reason=runtime.reason)

    def list_all(self) -> list[OciRuntime]:
        """All runtimes of the configuration, by name."""
        return sorted(self._found.values(), key=lambda runtime: runtime.name)

    def program(self, name: str) -> str:
        """Path of the program of a runtime; the default's for an empty name.

        Raises:
            InvalidArgument: there is none of this name.
            FailedPrecondition: it cannot be used here.
        """
        wanted = name or self.default
        runtime = self._found.get(wanted)
        if runtime is None:
            known = ", ".join(sorted(self._found))
            raise InvalidArgument(
                f"unknown or invalid runtime name: {wanted}: configured are {known}",
                field="runtime",
            )
        if not runtime.usable:
            raise FailedPrecondition(
                f"runtime {wanted} cannot be used: {runtime.reason}",
                resource=("runtime", wanted),
            )
        return runtime.path

    async def _probe(self, name: str, path: str) -> OciRuntime:
        program = shutil.which(path)
        if program is None:
            return OciRuntime(name, path, reason=f"there is no program {path}: install it")
        try:
            version = await _version(program)
        except (OSError, TimeoutError) as error:
            reason = str(error) or f"it did not answer within {_VERSION_TIMEOUT_S:.0f} s"
            return OciRuntime(name, program, reason=f"{program} --version failed: {reason}")
        if not version:
            return OciRuntime(name, program, reason=f"{program} --version told no version")
        return OciRuntime(name, program, version, self._obstacle(version))

    def _obstacle(self, version: str) -> str:
        """What is known to keep a runtime from working on this machine."""
        controllers = self._unified_controllers()
        if version.startswith("crun ") and controllers:
            return (
                "crun refuses a machine with cgroup v1 whose unified hierarchy has controllers "
                f"too ({controllers}): unmount {self._cgroups / 'unified'}"
            )
        return ""

    def _unified_controllers(self) -> str:
        """Controllers in the unified hierarchy of a hybrid layout; empty for any other layout."""
        if cgroup_layout(self._cgroups) != "hybrid":
            return ""
        return (self._cgroups / "unified" / "cgroup.controllers").read_text().strip()


def cgroup_layout(cgroups: Path = _CGROUPS) -> str:
    """``v2``, ``hybrid`` (v1 with a unified hierarchy beside it) or ``v1``."""
    if (cgroups / "cgroup.controllers").exists():
        return "v2"
    return "hybrid" if (cgroups / "unified" / "cgroup.controllers").exists() else "v1"


async def _version(program: str) -> str:
    process = await asyncio.create_subprocess_exec(
        program,
        "--version",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_VERSION_TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise OSError(f"it exited with {process.returncode}")
    return output.decode(errors="replace").partition("\n")[0].strip()
