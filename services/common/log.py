"""Logs: structlog, one JSON object per line on stderr; the request id that ties tiers together."""

from __future__ import annotations

import logging
import os
import sys

import structlog

from services.common.request import REQUEST_ID_KEY, new_request_id, request_id

__all__ = ["LEVELS", "REQUEST_ID_KEY", "configure", "new_request_id", "request_id"]

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
LEVELS = tuple(_LEVELS)


def configure(tier: str, level: str = "info") -> None:
    """Send this process' log to stderr.

    Args:
        tier: name of the service, a key of every line.
        level: one of LEVELS; what is below it is not formatted at all.
    """
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _add_request_id,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(tier=tier, pid=os.getpid())
    # Libraries that use the standard logging speak through the same lines.
    logging.basicConfig(level=logging.WARNING, handlers=[_StructlogHandler()], force=True)


class _StructlogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logger = structlog.get_logger(record.name)
        logger.log(
            max(record.levelno, logging.DEBUG),
            "library message",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def _add_request_id(
    _logger: object, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    current = request_id.get()
    if current:
        event.setdefault("request_id", current)
    return event
