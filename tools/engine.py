"""An engine in a directory of its own, for the demo, the bench and the tests."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Engine:
    """What a client needs to know of a running engine.

    Attributes:
        root: root directory of both tiers.
        state: state directory of both tiers.
        socket: the daemon's.
        containerd: containerd's socket.
        log: what ``theseus up`` and the tiers said.
        process: ``theseus up``.
    """

    root: Path
    state: Path
    socket: Path
    containerd: Path
    log: Path
    process: subprocess.Popen[str]


@contextmanager
def running(directory: Path, arguments: Sequence[str] = ()) -> Iterator[Engine]:
    """Run ``theseus up`` below ``directory`` until the block ends; it serves when this returns.

    Raises:
        RuntimeError: it did not come up; the message ends with what it said.
    """
    root, state, log = directory / "root", directory / "state", directory / "up.log"
    command = [
        sys.executable,
        "-m",
        "services.cli",
        "up",
        "--root",
        str(root),
        "--state",
        str(state),
    ]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            process_group=0,  # a Ctrl-C is for whoever runs it, and ends it in due order
        )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        if not ready:
            process.wait(timeout=10)
            raise RuntimeError(f"theseus up ended with {process.returncode}: {log.read_text()}")
        yield Engine(
            root,
            state,
            state / "daemon" / "daemon.sock",
            state / "containerd" / "containerd.sock",
            log,
            process,
        )
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()
