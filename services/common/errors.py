"""One exception hierarchy for all tiers: one class per kind of failure that a caller can act on.

A domain error subclasses one of these. The text says what was asked, what was found and what to
do, in lower case and without a full stop. How each becomes a gRPC status, and is made again from
one, is :mod:`services.common.rpc_errors`' business.
"""

from __future__ import annotations


class TheseusError(Exception):
    """Base of every failure that a client is told about in words.

    Attributes:
        message: the sentence for the client.
        retry_after_s: seconds after which the same call may go through, where that is known.
        field: the request field at fault (``InvalidArgument``), or empty.
        resource: ``(kind, name)`` of the thing at fault, or None.
        reason: a constant for programs, such as ``COMMAND_NOT_FOUND``, or empty.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        field: str = "",
        resource: tuple[str, str] | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s
        self.field = field
        self.resource = resource
        self.reason = reason


class InvalidArgument(TheseusError):
    """The request is wrong whatever the state of the system."""


class NotFound(TheseusError):
    """What the request names does not exist."""


class AlreadyExists(TheseusError):
    """The name that the request wants to create is taken."""


class PermissionDenied(TheseusError):
    """The caller, or this process, lacks a privilege."""


class Unauthenticated(TheseusError):
    """A remote wants credentials that were missing or wrong."""


class FailedPrecondition(TheseusError):
    """The system is not in the state that the request needs."""


class Aborted(TheseusError):
    """Concurrent work got in the way; the caller may start over."""


class OutOfRange(TheseusError):
    """An offset or a size lies past what exists."""


class Unavailable(TheseusError):
    """A tier or a remote cannot be reached now; the same call may go through later."""


class DeadlineExceeded(TheseusError):
    """The work did not end within its time limit."""


class Cancelled(TheseusError):
    """The caller gave up."""


class ResourceExhausted(TheseusError):
    """A bound was passed: a size, a count, a quota, or the disk."""


class Unimplemented(TheseusError):
    """The request is understood, and this version or runtime cannot do it."""


class DataLoss(TheseusError):
    """Data was corrupt: a digest, a size or a format does not match."""


class Internal(TheseusError):
    """A fault of Theseus itself, or of a program that it runs."""


class Unknown(Internal):
    """A program of others failed, and did not say in which of these ways."""
