"""The files of a bundle, and how they are written.

    <bundle>/config.json     OCI spec, written by containerd
             rootfs/         mounted by the shim
             shim.json       who the shim is; containerd writes it first, the shim completes it
             state.json      what the shim knows of its containers
             spool/          see spool.py
             log.json        the runtime's own log
             shim.log        the shim's standard error
             <id>.pid        written by the runtime
             options.json    runtime options of the container

containerd makes the directory and removes it; the shim may find it gone at any time. Files are
replaced by a rename, so that a reader sees the old or the new content, and are not fsynced: they
describe processes, which do not outlive the machine either.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from services.common import small_files
from services.common.errors import FailedPrecondition

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SPEC_MAX_BYTES = 16 << 20


class Bundle:
    """One bundle directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._prefix = f"{path}/"

    @property
    def rootfs(self) -> Path:
        """Where the root file system is mounted."""
        return self.path / "rootfs"

    @property
    def spool(self) -> Path:
        """Directory of the spool."""
        return self.path / "spool"

    @property
    def runtime_log(self) -> Path:
        """The runtime's log file."""
        return self.path / "log.json"

    def read_spec(self) -> dict[str, Any]:
        """The OCI spec of the container.

        Raises:
            FailedPrecondition: there is none, or it is not JSON.
        """
        path = f"{self._prefix}config.json"
        try:
            if os.stat(path).st_size > _SPEC_MAX_BYTES:  # noqa: PTH116
                raise FailedPrecondition(f"{path} is larger than {_SPEC_MAX_BYTES} bytes")
            spec = json.loads(small_files.read(path))
        except OSError as error:
            raise FailedPrecondition(
                f"the bundle has no readable {path}: {error.strerror}"
            ) from error
        except ValueError as error:
            raise FailedPrecondition(f"{path} is not valid JSON: {error}") from error
        if not isinstance(spec, dict):
            raise FailedPrecondition(f"{path} is not a JSON object")
        return spec

    def write(self, name: str, data: Mapping[str, object]) -> None:
        """Replace a JSON file of the bundle."""
        content = json.dumps(data).encode()
        small_files.replace(f"{self._prefix}{name}", f"{self._prefix}.{name}.tmp", content)

    def remove(self, name: str) -> None:
        """Remove a file of the bundle, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the bundle; empty when it is not there, or is not an object."""
        try:
            data = json.loads(small_files.read(f"{self._prefix}{name}"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}


def has_hooks(spec: Mapping[str, Any]) -> bool:
    """Whether programs are to be run at points of the container's life."""
    hooks = spec.get("hooks")
    return any(hooks.values()) if isinstance(hooks, dict) else bool(hooks)


def has_own_pid_namespace(spec: Mapping[str, Any]) -> bool:
    """Whether the container's init is init of a pid namespace: its end then ends all the others."""
    namespaces = (spec.get("linux") or {}).get("namespaces") or ()
    return any(entry.get("type") == "pid" and not entry.get("path") for entry in namespaces)
