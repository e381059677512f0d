"""Channels to another tier: retries, message limits, and the metadata that every call carries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import grpc

from services.common.request import REQUEST_ID_KEY, new_request_id, request_id

if TYPE_CHECKING:
    from pathlib import Path

NAMESPACE_KEY = "containerd-namespace"
"""gRPC metadata key of containerd's namespace, as upstream has it."""

MESSAGE_LIMIT_BYTES = 64 << 20
# Done twice these make two of a thing, or run it again: their callers look before they ask again.
_ONCE = [
    {"service": f"theseus.engine.v1.{service}", "method": method}
    for service in ("Containers", "Execs")
    for method in ("Create", "Start")
]
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {"name": _ONCE},
            {
                "name": [{}],
                # A tier that is being replaced answers UNAVAILABLE, or its socket is not there yet.
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            },
        ]
    }
)
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # The peer's address is a path: the name that HTTP/2 wants means nothing.
    ("grpc.default_authority", "localhost"),
    # Each channel has its own connection: one that a dead peer left is never picked up by another.
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy of the environment has no business with a Unix socket.
    ("grpc.enable_http_proxy", 0),
]


def connect(socket: Path | str, *, namespace: str = "") -> grpc.aio.Channel:
    """A channel to the service on a Unix socket; the caller closes it.

    It connects when first used, and again by itself. Every call carries the request id of the
    current context (a new one when there is none) and, if given, containerd's ``namespace``.
    """
    interceptors = [
        kind(namespace) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
    ]
    return grpc.aio.insecure_channel(
        f"unix:{str(socket).removeprefix('unix://')}", options=_OPTIONS, interceptors=interceptors
    )


class _Metadata:
    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def _add(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        present = {key for key, _ in metadata}
        if REQUEST_ID_KEY not in present:
            metadata.add(REQUEST_ID_KEY, request_id.get() or new_request_id())
        if self._namespace and NAMESPACE_KEY not in present:
            metadata.add(NAMESPACE_KEY, self._namespace)
        return grpc.aio.ClientCallDetails(
            method=details.method,
            timeout=details.timeout,
            metadata=metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )


class _UnaryUnary(_Metadata, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self._add(client_call_details), request)


class _UnaryStream(_Metadata, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self._add(client_call_details), request)


class _StreamUnary(_Metadata, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._add(client_call_details), request_iterator)


class _StreamStream(_Metadata, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self._add(client_call_details), request_iterator)
