"""Channels to another tier: retries, message limits, and the metadata that every call carries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

import grpc

from services.common import tracing
from services.common.request import REQUEST_ID_KEY, new_request_id, request_id

if TYPE_CHECKING:
    from pathlib import Path

NAMESPACE_KEY = "containerd-namespace"
"""gRPC metadata key of containerd's namespace, as upstream has it."""

MESSAGE_LIMIT_BYTES = 64 << 20
# Not repeated behind the caller's back. Done twice, the first five make two of a thing, or run it
# again: their callers look before they ask again. The others try long enough by themselves, and
# their UNAVAILABLE speaks of a registry.
_ONCE = [
    {"service": service, "method": method}
    for service, method in (
        ("theseus.engine.v1.Containers", "Create"),
        ("theseus.engine.v1.Containers", "Start"),
        ("theseus.engine.v1.Execs", "Create"),
        ("theseus.engine.v1.Execs", "Start"),
        ("theseus.engine.v1.Execs", "Run"),
        ("theseus.engine.v1.Images", "Pull"),
        ("theseus.engine.v1.Images", "Load"),
        ("containerd.services.transfer.v1.Transfer", "Transfer"),
    )
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
    # Shorter than the retries above go on, so that a call finds a peer that has just come back.
    ("grpc.max_reconnect_backoff_ms", 250),
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
    channel = grpc.aio.insecure_channel(
        f"unix:{str(socket).removeprefix('unix://')}", options=_OPTIONS
    )
    return _Channel(channel, namespace)


class _Channel(grpc.aio.Channel):
    """A channel whose calls carry metadata of ours.

    Not by interceptors: those cost a task or two for each call, and behind them a stream whose
    peer ended it keeps one that waits for ever.
    """

    def __init__(self, channel: grpc.aio.Channel, namespace: str) -> None:
        self._channel = channel
        self._namespace = namespace

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._made(self._channel.unary_unary, arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._made(self._channel.unary_stream, arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._made(self._channel.stream_unary, arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._made(self._channel.stream_stream, arguments, options)

    def _made(self, make: Any, arguments: Any, options: Any) -> Any:
        name = arguments[0] if arguments else options["method"]
        return _Method(make(*arguments, **options), name, self._namespace)


class _Method:
    """One method of a service, of whatever kind."""

    def __init__(self, method: Any, name: str, namespace: str) -> None:
        self._method = method
        self._name = name
        self._namespace = namespace

    def __call__(self, *arguments: Any, metadata: Any = None, **options: Any) -> Any:
        complete = grpc.aio.Metadata(*(metadata or ()))
        present = {key for key, _ in complete}
        if REQUEST_ID_KEY not in present:
            complete.add(REQUEST_ID_KEY, request_id.get() or new_request_id())
        if self._namespace and NAMESPACE_KEY not in present:
            complete.add(NAMESPACE_KEY, self._namespace)
        done = tracing.calling(self._name, complete)
        call = self._method(*arguments, metadata=complete, **options)
        if done is not None:
            call.add_done_callback(done)
        return call
