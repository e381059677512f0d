"""What containers leave on a machine: taken before and after, to find what was left behind.

Meant for a sandbox (:mod:`tools.sandbox`), where nobody else makes any of it meanwhile.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import linux

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STATE_DIRECTORIES = ("/run/theseus*", "/var/lib/theseus*")
"""Patterns of the places where engines keep what is theirs."""

_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Traces:
    """All that there is of each kind."""

    processes: frozenset[str]
    mounts: frozenset[str]
    links: frozenset[str]
    addresses: frozenset[str]
    cgroups: frozenset[str]
    nft: frozenset[str]
    files: frozenset[str]

    def beyond(self, before: Traces) -> list[str]:
        """What is here and was not there, one line each."""
        return [
            f"{field.name}: {thing}"
            for field in fields(self)
            for thing in sorted(getattr(self, field.name) - getattr(before, field.name))
        ]


NOTHING = Traces(*[frozenset[str]()] * len(fields(Traces)))
"""No trace of any kind."""


def taken() -> Traces:
    """The traces that are there now."""
    return Traces(
        processes=frozenset(_processes()),
        mounts=frozenset(_mounts()),
        links=frozenset(name for _, name in socket.if_nameindex()),
        addresses=frozenset(_lines("ip", "-o", "-4", "addr", "show")),
        cgroups=frozenset(_cgroups()),
        nft=frozenset(_lines("nft", "list", "tables")),
        files=frozenset(_files()),
    )


def left_since(before: Traces, *, patience_s: float = 5.0) -> list[str]:
    """What was left, once it no longer becomes less; empty as soon as nothing is."""
    give_up_at = time.monotonic() + patience_s
    while (left := taken().beyond(before)) and time.monotonic() < give_up_at:
        time.sleep(_PAUSE_S)
    return left


def clear(before: Traces) -> None:
    """Take away what an engine keeps for containers that outlive it: bridge, table, cgroups.

    To be called when there are no such containers any more.
    """
    now = taken()
    for name in now.links - before.links:
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
    for table in now.nft - before.nft:
        subprocess.run(["nft", "delete", *table.split()], check=False, capture_output=True)
    for path in sorted(now.cgroups - before.cgroups, reverse=True):  # children first
        with suppress(OSError):
            Path(path).rmdir()


def _processes() -> Iterator[str]:
    ours = {os.getpid(), *_children(os.getpid())}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in ours:
            continue
        start_time = linux.process_start_time(int(entry.name))
        if start_time is None:
            continue
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended
            continue
        if words:  # the kernel's own have none
            yield f"{entry.name} (since tick {start_time}) {words.strip()[:200]}"


def _children(pid: int) -> Iterator[int]:
    """Those helpers that a Python program itself keeps, such as multiprocessing's."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended
            for child in (task / "children").read_text().split():
                if b"multiprocessing" in Path(f"/proc/{child}/cmdline").read_bytes():
                    yield int(child)


def _mounted() -> Iterator[tuple[str, str]]:
    """Mount points and their file systems' types."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        yield words[4], words[words.index("-") + 1]


def _mounts() -> Iterator[str]:
    return (f"{target} ({kind})" for target, kind in _mounted())


def _cgroups() -> Iterator[str]:
    for target, kind in _mounted():
        if kind in ("cgroup", "cgroup2"):
            for directory, names, _ in os.walk(target):
                yield from (f"{directory}/{name}" for name in names)


def _files() -> Iterator[str]:
    for pattern in STATE_DIRECTORIES:
        yield from map(str, Path("/").glob(pattern.removeprefix("/")))


def _lines(*command: str) -> Iterable[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError:
        return ()
    # Life times change by themselves.
    return [line for line in done.stdout.splitlines() if "valid_lft" not in line or "inet" in line]
