"""The one table between our exceptions and gRPC's status codes, read in both directions.

A server's interceptor calls :func:`to_status`; a client wraps its calls in :func:`translated`.
What a domain error carries beside its sentence travels as ``google.rpc`` details in the
``grpc-status-details-bin`` trailing metadata: ``BadRequest`` (field), ``ResourceInfo`` (resource),
``RetryInfo`` (retry_after_s) and ``ErrorInfo`` (reason).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc

from services.common import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.rpc.status_pb2 import Status

DETAILS_KEY = "grpc-status-details-bin"
ERROR_DOMAIN = "theseus"

_CODES: dict[type[errors.TheseusError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.Internal: grpc.StatusCode.INTERNAL,
    errors.Unknown: grpc.StatusCode.UNKNOWN,
}
_CLASSES = {code: kind for kind, code in _CODES.items()}
_KINDS = {code.value[0]: kind for code, kind in _CLASSES.items()}
_BROKEN_WRITE = "Internal error from Core"
"""How grpc.aio ends a call, with INTERNAL, whose connection broke while a request was written."""


def code_of(error: errors.TheseusError) -> grpc.StatusCode:
    """The status code of the nearest class of ``error`` that has one."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return grpc.StatusCode.INTERNAL


def to_status(
    error: errors.TheseusError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Code, sentence and trailing metadata that stand for ``error`` on the wire."""
    code = code_of(error)
    if not (error.field or error.resource or error.reason or error.retry_after_s is not None):
        return code, error.message, ()
    status = _details(error, code)
    return code, error.message, ((DETAILS_KEY, status.SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError) -> errors.TheseusError:
    """The exception that a peer of ours raised, or the nearest to what another program meant."""
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _BROKEN_WRITE:
        return errors.Unavailable("the connection broke while a request was written")
    kind = _CLASSES.get(error.code(), errors.Internal)
    message = error.details() or f"{error.code().name.lower()} without a message"
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return _with_details(kind, message, value)
    return kind(message)


def error_of(status: Status) -> errors.TheseusError:
    """The exception that a status on its own stands for; ttrpc has such."""
    kind = _KINDS.get(status.code, errors.Internal)
    message = status.message or f"status {status.code} without a message"
    return _detailed(kind, message, status) if status.details else kind(message)


@contextmanager
def translated() -> Iterator[None]:
    """Turn a failed call inside the block into our exception (see :func:`from_rpc_error`)."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


def _details(error: errors.TheseusError, code: grpc.StatusCode) -> Status:
    # Imported late: a shim that never fails in such words never pays for these modules.
    from google.rpc import error_details_pb2, status_pb2

    status = status_pb2.Status(code=code.value[0], message=error.message)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.resource:
        kind, name = error.resource
        status.details.add().Pack(
            error_details_pb2.ResourceInfo(resource_type=kind, resource_name=name)
        )
    if error.reason:
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)
        )
    if error.retry_after_s is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(info)
    return status


def _with_details(
    kind: type[errors.TheseusError], message: str, serialized: bytes
) -> errors.TheseusError:
    from google.protobuf.message import DecodeError
    from google.rpc import status_pb2

    try:
        status = status_pb2.Status.FromString(serialized)
    except DecodeError:  # another program's trailer; its code and sentence still hold
        return kind(message)
    return _detailed(kind, message, status)


def _detailed(kind: type[errors.TheseusError], message: str, status: Status) -> errors.TheseusError:
    from google.rpc import error_details_pb2

    field, reason = "", ""
    resource: tuple[str, str] | None = None
    retry_after_s: float | None = None
    request, info = error_details_pb2.BadRequest(), error_details_pb2.ResourceInfo()
    retry, why = error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(request) and request.field_violations:
            field = request.field_violations[0].field
        elif detail.Unpack(info):
            resource = (info.resource_type, info.resource_name)
        elif detail.Unpack(why):
            reason = why.reason
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return kind(message, field=field, resource=resource, reason=reason, retry_after_s=retry_after_s)
