"""What criu says: runtimes only tell that it failed, and where its log is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

CHECKPOINT_LOG = "dump.log"
RESTORE_LOG = "restore.log"
_LINES = 4
_TAIL_BYTES = 1 << 20
_ERROR = re.compile(r"Error \([^)]*\): (.*)")


def reason(log: Path) -> str:
    """The last errors in one of criu's logs, in its words; empty where there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return last_errors(text)


def last_errors(text: str) -> str:
    """The last errors among lines of criu's."""
    found = [match[1].strip() for line in text.splitlines() if (match := _ERROR.search(line))]
    return "; ".join(found[-_LINES:])
