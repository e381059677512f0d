"""Which runtimes can be used here, and why others cannot: ``theseus-shim probe``.

Looked at are runc, crun, what the administrator configured, and plug-ins. Quick and without side
effects: a program is asked for its version, and what is known to stop a
program is looked for. crun refuses every container on a host whose cgroups are hybrid (v1
controllers, and a v2 hierarchy at ``/sys/fs/cgroup/unified``) as soon as one controller lives in
the v2 part ("cgroups in hybrid mode not supported").
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import TheseusError
from services.common.frozen import frozen
from services.shim.runtimes import catalogue, criu, programs
from services.shim.runtimes.programs import Program
from services.shim.runtimes.runtime import RuntimeMissing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.metadata import EntryPoint

KNOWN_RUNTIMES = ("runc", "crun")
_TIMEOUT_S = 5.0
_CGROUPS = Path("/sys/fs/cgroup")


@frozen
class ProbeResult:
    """What was found about one runtime.

    Attributes:
        name: as it was asked for.
        path: of the program; empty when there is none.
        version: first line of ``--version``.
        usable: whether containers can be expected to run.
        reason: why not.
        checkpoints: whether containers can be checkpointed and restored.
        no_checkpoints: why not.
    """

    name: str
    path: str = ""
    version: str = ""
    usable: bool = False
    reason: str = ""
    checkpoints: bool = False
    no_checkpoints: str = ""


def probe(names: Sequence[str] = (), *, cgroups: Path = _CGROUPS) -> list[ProbeResult]:
    """Look at runtimes, at all that are known by default.

    Blocks for as long as the slowest takes to print its version.

    Raises:
        InvalidArgument: the administrator's configuration is wrong.
    """
    if names:
        plugged = {} if all(map(_is_program, names)) else catalogue.plug_ins()
    else:
        plugged = catalogue.plug_ins()
        names = list(dict.fromkeys([*KNOWN_RUNTIMES, *programs.configured(), *plugged]))
    started = [(name, _Version.ask(name) if _is_program(name) else None) for name in names]
    return [
        version.result(cgroups) if version is not None else _plug_in(name, plugged.get(name))
        for name, version in started
    ]


def hybrid_controllers(cgroups: Path = _CGROUPS) -> list[str]:
    """Controllers of the v2 hierarchy on a host that also has v1 controllers; else empty."""
    if (cgroups / "cgroup.controllers").exists():
        return []
    try:
        return (cgroups / "unified" / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def _is_program(name: str) -> bool:
    try:
        programs.find(name)
    except RuntimeMissing:
        return False
    except TheseusError:
        return True  # which is told when it is asked
    return True


def _plug_in(name: str, entry: EntryPoint | None) -> ProbeResult:
    try:
        if entry is None:
            programs.find(name)
            return ProbeResult(name)
        factory = catalogue.load(entry)
        reason = str(getattr(factory, "obstacle", str)())
    except TheseusError as error:
        return ProbeResult(name, reason=error.message)
    version = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
    return ProbeResult(name, entry.value, version, usable=not reason, reason=reason)


class _Version:
    """A program that was asked for its version; several answer side by side."""

    def __init__(self, name: str, program: Program, asked: subprocess.Popen[bytes] | None) -> None:
        self._name = name
        self._program = program
        self._asked = asked
        self._reason = ""

    @classmethod
    def ask(cls, name: str) -> _Version:
        try:
            program = programs.find(name)
        except TheseusError as error:
            version = cls(name, Program(""), None)
            version._reason = error.message
            return version
        try:
            asked = subprocess.Popen(
                [program.path, *program.arguments, "--version"],
                env=programs.ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            version = cls(name, program, None)
            version._reason = f"{program.path} cannot be started: {error.strerror}"
            return version
        return cls(name, program, asked)

    def result(self, cgroups: Path) -> ProbeResult:
        path = self._program.path
        if self._asked is None:
            return ProbeResult(self._name, path, reason=self._reason)
        with self._asked:
            try:
                answer, _ = self._asked.communicate(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._asked.kill()
                reason = f"{path} --version did not end in {_TIMEOUT_S:.0f} s"
                return ProbeResult(self._name, path, reason=reason)
        version = answer.decode(errors="replace").partition("\n")[0].strip()
        if self._asked.returncode != 0 or not version:
            reason = f"{path} --version exited with {self._asked.returncode} and no version"
            return ProbeResult(self._name, path, reason=reason)
        reason = _known_obstacle(version, cgroups)
        obstacle = _checkpoint_obstacle(self._program)
        return ProbeResult(
            self._name,
            path,
            version,
            usable=not reason,
            reason=reason,
            checkpoints=not obstacle,
            no_checkpoints=obstacle,
        )


def _checkpoint_obstacle(program: Program) -> str:
    """Why a runtime cannot checkpoint here; empty if nothing is known."""
    if "checkpoint" in program.lacks:
        return "its configuration says that it lacks it"
    try:
        knows = _called(program.path, *program.arguments, "checkpoint", "--help").returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        knows = False
    return _criu_obstacle() if knows else f"{program.path} was built without it"


@cache
def _criu_obstacle() -> str:
    path = shutil.which("criu", path=programs.ENVIRONMENT["PATH"])
    if path is None:
        return "criu is not installed"
    try:
        done = _called(path, "check")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} check does not answer: {error}"
    if done.returncode == 0:
        return ""
    said = done.stdout.decode(errors="replace")
    return f"{path} check: {criu.last_errors(said) or said.strip() or 'it fails'}"


def _called(*argv: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        argv,
        env=programs.ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_TIMEOUT_S,
        check=False,
    )


def _known_obstacle(version: str, cgroups: Path) -> str:
    controllers = hybrid_controllers(cgroups)
    if not version.startswith("crun ") or not controllers:
        return ""
    return (
        f"crun refuses a hybrid cgroup host with {', '.join(controllers)} in the unified "
        f"hierarchy: unmount {cgroups / 'unified'}, or move the controllers to v1"
    )
