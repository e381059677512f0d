"""What one shim is told at its birth, and the checks on it.

A shim is told once, by the factory's request or by the arguments of ``theseus-shim serve``; nothing
is read from a configuration file.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from services.common.errors import InvalidArgument
from services.common.frozen import frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOG_LEVELS = ("debug", "info", "warning", "error")
_TEXT_MAX_BYTES = 4096


@frozen
class ShimConfig:
    """Settings of one shim.

    Attributes:
        namespace: containerd namespace of its containers.
        id: id of the shim: that of its container, or of the group.
        bundle: its directory (see ``bundle.py``).
        socket: Unix socket that it serves on.
        registry: containerd's socket, where it registers; no file need be there yet.
        instance_id: 32 hex digits that name this bundle's shim for ever, whatever process it is.
        default_runtime: OCI runtime of containers whose options name none.
        request_id: request that it is started for, for the log.
        log_level: one of debug, info, warning, error.
        runtime_timeout_s: time after which a runtime that has not answered is killed.
        keeper: socket of the keeper of descriptors; None: there is none.
        adopt: take over the containers of a shim that died.
        come_up_limit_s: time in which a new version has to serve before it is rolled back.
        linger_s: time that a shim without containers waits for Shutdown before it ends by itself.
    """

    namespace: str
    id: str
    bundle: Path
    socket: Path
    registry: Path
    instance_id: str
    default_runtime: str = "runc"
    request_id: str = ""
    log_level: str = "info"
    runtime_timeout_s: float = 60.0
    linger_s: float = 10.0
    come_up_limit_s: float = 15.0
    keeper: Path | None = None
    adopt: bool = False

    @classmethod
    def from_request(cls, request: Mapping[str, object]) -> ShimConfig:
        """The settings that a factory request holds; keys that are not known are ignored.

        Raises:
            InvalidArgument: one is missing, of the wrong type, or out of bounds.
        """
        values: dict[str, object] = {}
        for name in cls.__dataclass_fields__:
            if name in request:
                values[name] = _checked(name, request[name])
            elif name in _REQUIRED:
                raise InvalidArgument(f"'{name}' is missing", field=name)
        if values.get("log_level", "info") not in _LOG_LEVELS:
            raise InvalidArgument(
                f"'log_level' must be one of {', '.join(_LOG_LEVELS)}", field="log_level"
            )
        return cls(**values)  # type: ignore[arg-type]  # _checked gave each its type

    def to_request(self) -> dict[str, object]:
        """The request that these settings can be had back from."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in values.items()
            if value is not None
        }


def waiting_name() -> str:
    """Name of this process' socket while it waits to be told which shim it is."""
    return f"waiting-{os.getpid()}"


_PATHS = frozenset({"bundle", "socket", "registry", "keeper"})
_SECONDS = frozenset({"runtime_timeout_s", "linger_s", "come_up_limit_s"})
_REQUIRED = frozenset({"namespace", "id", "bundle", "socket", "registry", "instance_id"})


def _checked(name: str, value: object) -> object:
    if name in _SECONDS:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise InvalidArgument(f"'{name}' must be a positive number", field=name)
        return float(value)
    if name == "adopt":
        if not isinstance(value, bool):
            raise InvalidArgument(f"'{name}' must be true or false", field=name)
        return value
    if not isinstance(value, str):
        raise InvalidArgument(f"'{name}' must be a string", field=name)
    if len(value) > _TEXT_MAX_BYTES or "\0" in value:
        raise InvalidArgument(f"'{name}' is longer than a path, or holds a NUL", field=name)
    if name in _PATHS:
        if not value.startswith("/"):
            raise InvalidArgument(f"'{name}' must be an absolute path", field=name)
        return Path(value)
    if name in _REQUIRED and not value:
        raise InvalidArgument(f"'{name}' is empty", field=name)
    return value
