"""From a runtime's own words to an error: its log file, and what its sentences mean.

runc and crun write JSON lines to the file that ``--log`` names. The words that stand for a command
that is not there (127) or cannot be executed (126) are those that moby's daemon looks for
(``daemon/errors.go``), for runc's messages and for crun's.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from services.shim.runtimes.runtime import (
    CommandNotExecutable,
    CommandNotFound,
    RuntimeFailed,
    UnknownToRuntime,
)

if TYPE_CHECKING:
    from pathlib import Path

    from services.common.errors import TheseusError

MESSAGE_MAX_BYTES = 2048
_LOG_TAIL_BYTES = 65536
_UNKNOWN = re.compile(
    r"container (\S+ )?does not exist|error opening file `[^`]*/status`", re.IGNORECASE
)
_NOT_EXECUTABLE = re.compile(
    r"permission denied|is a directory|exec format error|open executable: operation not permitted",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(
    r"executable file .*not found|no such file or directory|not a directory"
    r"|executable found relative to current directory",
    re.IGNORECASE | re.DOTALL,
)


def read_log(path: Path, offset: int) -> str:
    """Messages that the runtime logged behind ``offset``: the last error, else the last line."""
    try:
        with path.open("rb") as file:
            file.seek(max(offset, file.seek(0, 2) - _LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    last_line = last_error = ""
    for line in lines:
        level, message = _parse(line)
        if message:
            last_line = message
            if level in ("error", "fatal"):
                last_error = message
    return bounded(last_error or last_line)


def classify_creation(text: str, sentence: str) -> TheseusError:
    """The error for a create or exec that failed with ``text``."""
    if _UNKNOWN.search(text):
        return UnknownToRuntime(sentence)
    if _NOT_EXECUTABLE.search(text):
        return CommandNotExecutable(sentence)
    if _NOT_FOUND.search(text):
        return CommandNotFound(sentence)
    return RuntimeFailed(sentence)


def classify(text: str, sentence: str) -> TheseusError:
    """The error for any other command that failed with ``text``."""
    return UnknownToRuntime(sentence) if _UNKNOWN.search(text) else RuntimeFailed(sentence)


def bounded(text: str) -> str:
    """``text`` as one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_MAX_BYTES else f"{line[:MESSAGE_MAX_BYTES]}..."


def _parse(line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError:
        return "", line.strip()
    if not isinstance(entry, dict):
        return "", line.strip()
    return str(entry.get("level", "")), str(entry.get("msg", "")).strip()
