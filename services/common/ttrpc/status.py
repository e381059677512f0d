"""Our exceptions as the numbers of gRPC's status codes, which ttrpc has in common with it.

The numbers are of gRPC's specification (statuscodes.md); the table says the same as that of
``services.common.rpc_errors``, which cannot be used here because it imports gRPC.
"""

from __future__ import annotations

from services.common import errors

OK = 0
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
RESOURCE_EXHAUSTED = 8
UNIMPLEMENTED = 12
INTERNAL = 13

CODES: dict[type[errors.TheseusError], int] = {
    errors.Cancelled: 1,
    errors.Unknown: 2,
    errors.InvalidArgument: INVALID_ARGUMENT,
    errors.DeadlineExceeded: DEADLINE_EXCEEDED,
    errors.NotFound: 5,
    errors.AlreadyExists: 6,
    errors.PermissionDenied: 7,
    errors.ResourceExhausted: RESOURCE_EXHAUSTED,
    errors.FailedPrecondition: 9,
    errors.Aborted: 10,
    errors.OutOfRange: 11,
    errors.Unimplemented: UNIMPLEMENTED,
    errors.Internal: INTERNAL,
    errors.Unavailable: 14,
    errors.DataLoss: 15,
    errors.Unauthenticated: 16,
}


def code_of(error: errors.TheseusError) -> int:
    """The code of the nearest class of ``error`` that has one."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), INTERNAL)
