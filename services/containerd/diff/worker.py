"""The program that unpacks layers, and packs them: ``python -m services.containerd.diff.worker``.

A process of its own, because Python does one thing at a time and this one takes the processor for
seconds; and because it has a mount namespace for itself. It reads jobs from stdin and answers on
stdout, a JSON object a line, one after the other, and ends with its stdin.

    {"job": "apply", "blob": PATH, "mounts": [...], "scratch": PATH, "sync": false,
     "detached": false}
    {"job": "compare", "lower": [...], "upper": [...], "output": PATH, "media_type": TEXT,
     "newest_ns": null, "scratch": PATH}
    ──▶ {"digest": "sha256:…", "size_bytes": 1234}
    ──▶ {"error": "DataLoss", "message": "the layer's gzip stream is cut short"}
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from services.common import linux, log
from services.common.errors import Internal, TheseusError
from services.common.mounts import Mount
from services.containerd.diff.pack import pack_layer
from services.containerd.diff.unpack import unpack_layer

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO, TextIO

_DEEPEST_NAME = 2048  # components in PATH_MAX bytes
logger = structlog.get_logger(__name__)


def main() -> None:
    """Serve jobs until stdin ends."""
    log.configure("containerd-layers")
    linux.set_process_name("theseus-layers")
    linux.set_parent_death_signal(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is for the service to act on
    sys.setrecursionlimit(sys.getrecursionlimit() + 4 * _DEEPEST_NAME)
    os.umask(0)
    with contextlib.suppress(PermissionError):
        # Its mounts are its own. Slave, not private: what the host unmounts must go from here too.
        linux.unshare(linux.CLONE_NEWNS)
        linux.mount("", "/", flags=linux.MS_SLAVE | linux.MS_REC)
    # Nothing but answers may get into the pipe.
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)


def serve(jobs: TextIO, answers: IO[bytes]) -> None:
    """Do each job and write its answer; ends also when nobody is there to read it."""
    for line in jobs:
        answer = memoryview(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        try:
            while answer:
                answer = answer[answers.write(answer) :]
        except BrokenPipeError:
            return  # the service is gone, and its successor unpacks the layer anew


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        digest, size_bytes = _JOBS[job.pop("job")](**job)
    except TheseusError as error:
        return {"error": type(error).__name__, "message": error.message[:4096]}
    except Exception:
        logger.exception("job failed")
        return {
            "error": Internal.__name__,
            "message": "the layer could not be handled: see the log",
        }
    return {"digest": digest, "size_bytes": size_bytes}


def _apply_job(
    *, blob: str, mounts: list[dict[str, Any]], scratch: str, sync: bool, detached: bool
) -> tuple[str, int]:
    return unpack_layer(
        Path(blob), _mounts(mounts), scratch=Path(scratch), sync=sync, detached=detached
    )


def _mounts(documents: list[dict[str, Any]]) -> list[Mount]:
    return [
        Mount(doc["type"], doc["source"], doc["target"], tuple(doc["options"])) for doc in documents
    ]


def _compare_job(
    *,
    lower: list[dict[str, Any]],
    upper: list[dict[str, Any]],
    output: str,
    media_type: str,
    newest_ns: int | None,
    scratch: str,
) -> tuple[str, int]:
    return pack_layer(
        _mounts(lower),
        _mounts(upper),
        Path(output),
        media_type=media_type,
        newest_ns=newest_ns,
        scratch=Path(scratch),
    )


_JOBS: dict[str, Callable[..., tuple[str, int]]] = {"apply": _apply_job, "compare": _compare_job}

if __name__ == "__main__":
    main()
