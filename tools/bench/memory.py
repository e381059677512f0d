"""Which processes are an engine's, and how much memory they have between them.

An engine's are those whose command line names its directory, and what those have started, but not
what runs in a container: that has a pid namespace of its own.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.bench.engines.engine import Engine

_PROC = Path("/proc")
_KSM = Path("/sys/kernel/mm/ksm")


def pss_by_tier(engine: Engine) -> dict[str, tuple[int, float]]:
    """Number of processes and proportional set size in MiB, by tier."""
    found: dict[str, tuple[int, float]] = {}
    for pid, argv in processes(str(engine.place)).items():
        with suppress(OSError):  # it ended meanwhile
            tier, size = engine.tier(pid, argv), pss_mib(pid)
            count, total = found.get(tier, (0, 0.0))
            found[tier] = count + 1, total + size
    return found


def merges(engine: Engine) -> bool:
    """Whether an engine lets the kernel merge memory of its processes (KSM)."""
    for pid in processes(str(engine.place)):
        with suppress(OSError):  # it ended meanwhile, or the kernel does not tell
            if "ksm_mergeable: yes" in (_PROC / str(pid) / "ksm_stat").read_text():
                return True
    return False


def merging() -> bool:
    """Whether the kernel looks for equal pages at this moment."""
    try:
        return (_KSM / "run").read_text().strip() == "1"
    except OSError:  # it has no KSM
        return False


def pss_mib(pid: int) -> float:
    """A process's proportional set size (proc_pid_smaps_rollup)."""
    for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0  # it is a zombie


def processes(directory: str) -> dict[int, list[str]]:
    """Command lines of an engine's processes, by process id."""
    argv = {pid: words for pid, words in _commands() if words and _pid_namespace(pid) == _OURS}
    parents = {pid: parent(pid) for pid in argv}
    inside = f"{directory}/"
    named = {pid for pid, words in argv.items() if any(inside in word for word in words)}

    def belongs(pid: int) -> bool:
        while pid in argv:
            if pid in named:
                return True
            pid = parents[pid]
        return False

    return {pid: words for pid, words in argv.items() if belongs(pid)}


def command(pid: int) -> list[str]:
    """A process's command line; empty if it has ended."""
    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
    return [word for word in words if word]


def name(pid: int) -> str:
    """What a process is called (proc_pid_comm(5)); empty if it has ended."""
    try:
        return (_PROC / str(pid) / "comm").read_text().rstrip("\n")
    except OSError:
        return ""


def _commands() -> Iterator[tuple[int, list[str]]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            yield int(entry.name), command(int(entry.name))


def parent(pid: int) -> int:
    """Process id of a process's parent; 0 if it has none, or has ended."""
    try:
        # proc_pid_stat(5): the command in parentheses may hold anything.
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _pid_namespace(pid: int) -> str:
    try:
        return str((_PROC / str(pid) / "ns" / "pid").readlink())
    except OSError:
        return ""


_OURS = str((_PROC / "self" / "ns" / "pid").readlink())
