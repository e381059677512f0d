"""The id that ties together what all tiers log about one request of a client.

Apart from :mod:`services.common.log` so that a program which only makes calls, such as the
``theseus`` command, starts without the logging library.
"""

from __future__ import annotations

import os
from contextvars import ContextVar

REQUEST_ID_KEY = "theseus-request-id"
"""gRPC metadata key in which the request id travels."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Id of the request that the current task works for; empty outside of one."""


def new_request_id() -> str:
    """A fresh id: 16 hex digits."""
    return os.urandom(8).hex()
