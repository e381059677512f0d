"""Logs: structlog, one JSON object per line on stderr; the request id that ties tiers together.

A line is made by one function instead of structlog's chain of processors: a shim logs a dozen lines
in its life, and each function on the way costs it a page of memory of its own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import structlog

from services.common.request import REQUEST_ID_KEY, new_request_id, request_id

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LEVELS", "REQUEST_ID_KEY", "configure", "new_request_id", "request_id"]

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
LEVELS = tuple(_LEVELS)


def configure(tier: str, level: str = "info") -> None:
    """Send this process' log to stderr.

    Args:
        tier: name of the service, a key of every line.
        level: one of LEVELS; what is below it is not formatted at all.
    """
    Logger.least = _LEVELS[level]
    structlog.configure(
        wrapper_class=Logger,  # type: ignore[arg-type]  # nobody unbinds
        logger_factory=_no_logger,
        cache_logger_on_first_use=True,
    )
    become(tier)
    # Libraries that use the standard logging speak through the same lines.
    logging.basicConfig(level=logging.WARNING, handlers=[_StructlogHandler()], force=True)


def become(tier: str) -> None:
    """Be another process than the one that configured: a fork of it, say."""
    structlog.contextvars.bind_contextvars(tier=tier, pid=os.getpid())


def describe(level: str, **about: object) -> None:
    """Say what the process is about from now on, in every line, whatever its context.

    Args:
        level: one of LEVELS.
        about: keys of every line, in place of those that an earlier call gave.
    """
    Logger.least = _LEVELS[level]
    Logger.about = about


class Logger:
    """What ``structlog.get_logger`` gives once :func:`configure` was called."""

    least = 0
    """Lines below this level are dropped; of the process, not of one logger."""
    errors = 0
    """How many lines of the process told of an error."""
    about: Mapping[str, object] = {}
    """What every line of the process has besides; see :func:`describe`."""

    def __init__(self, logger: object, processors: object, context: Mapping[str, Any]) -> None:
        del logger, processors
        self._context = context

    def bind(self, **values: object) -> Logger:
        """A logger whose lines have these keys too."""
        return Logger(None, None, {**self._context, **values})

    def debug(self, event: str, **fields: object) -> None:
        """Log what helps to find an error in the program."""
        if self.least <= 10:
            self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Log what happens."""
        if self.least <= 20:
            self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Log what somebody should look at some day."""
        if self.least <= 30:
            self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Log what somebody should look at now."""
        self._write("error", event, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Log an error with the traceback of the exception that is being handled."""
        self._write("error", event, {"exc_info": True, **fields})

    def _write(self, level: str, event: str, fields: dict[str, object]) -> None:
        if exc_info := fields.pop("exc_info", None):
            fields["exception"] = _traceback(exc_info)
        if identity := request_id.get():
            fields.setdefault("request_id", identity)
        if level == "error":
            Logger.errors += 1
        line = {**Logger.about, **structlog.contextvars.get_contextvars(), **self._context}
        line.update(fields)
        line["event"], line["level"], line["timestamp"] = event, level, _now()
        sys.stderr.write(json.dumps(line, default=repr) + "\n")
        sys.stderr.flush()


def _no_logger(*_names: object) -> None:
    return None


def _now() -> str:
    """RFC 3339 in UTC, with microseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds // 1000:06d}Z"


def _traceback(exc_info: object) -> str:
    # Imported late: most processes never fail.
    import traceback

    if isinstance(exc_info, BaseException):
        error: BaseException | None = exc_info
    elif isinstance(exc_info, tuple):
        error = exc_info[1]
    else:
        error = sys.exc_info()[1]
    return "" if error is None else "".join(traceback.format_exception(error)).rstrip()


class _StructlogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        write = logger.error if record.levelno >= logging.ERROR else logger.warning
        write(
            "library message",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )
