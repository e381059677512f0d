"""What the user reads when a command fails, and the exit code that says it to a script."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from services.common.request import request_id

if TYPE_CHECKING:
    from services.common.errors import TheseusError

_BY_REASON = {"COMMAND_NOT_EXECUTABLE": 126, "COMMAND_NOT_FOUND": 127}


def report(error: TheseusError, *, otherwise: int = 1) -> int:
    """Print one sentence with the request's id, by which every tier's log finds it.

    Returns:
        126 or 127 where the error says that a command could not be executed, else ``otherwise``.
    """
    sys.stdout.flush()
    sys.stderr.write(f"theseus: {error.message} (request {request_id.get()})\n")
    return _BY_REASON.get(error.reason, otherwise)


def warn(sentence: str) -> None:
    """Print a warning."""
    sys.stdout.flush()
    sys.stderr.write(f"theseus: warning: {sentence}\n")
