"""Bundles: the directory that containerd and a shim share for the life of one task.

    <state>/tasks/<namespace>/<id>/
        shim.json       who the shim is; containerd writes it first, the shim completes it, or
                        containerd itself for one that others wrote
        config.json     the OCI spec
        rootfs/         where the shim mounts the root file system
        spool/<seq>     events that containerd has not acknowledged yet (the shim's)
        state.json      the shim's own notes
        gone.json       how the processes ended, once the shim was given up (containerd's)
        deleting        removal has begun: whoever finds it goes on with it (it also may have where
                        there is none: see ``undertaker.py``)

A bundle is made under a name that begins with a dot and renamed once it is complete, so a directory
with a plain name always has shim.json and config.json. Removal writes ``deleting``, unmounts what
lies beneath, renames the directory back to a dotted name and removes that; each step can be done
again. What has a dotted name at start is rubbish of an interrupted step.

State of another boot is void: its processes are gone, whatever their pids may be now.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.common import linux, small_files
from services.common.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted
from services.common.frozen import frozen, plain
from services.common.sockets import check_socket_path
from services.containerd.identifiers import checked_identifier
from services.containerd.tasks.groups import group_of
from services.containerd.tasks.processes import ProcessId

if TYPE_CHECKING:
    from collections.abc import Iterator


SHIM_FILE = "shim.json"
CONFIG_FILE = "config.json"
GONE_FILE = "gone.json"
DELETING_FILE = "deleting"


@frozen
class ShimRecord:
    """Content of shim.json. ``pid`` and ``start_time`` are 0 until the shim serves.

    ``socket`` is that of the process that serves it, which may serve others of its ``group`` too.

    ``sandbox`` is the id of the sandbox that the container belongs to: its own for a sandbox.

    A shim that others wrote has a ``binary``, and ``address`` and ``init``, the pid and start time
    of the container's first process, once they are known.
    """

    instance_id: str
    namespace: str
    id: str
    socket: str
    boot_id: str
    pid: int = 0
    start_time: int = 0
    group: str = ""
    sandbox: str = ""
    binary: str = ""
    address: str = ""
    init: tuple[int, int] = (0, 0)


@frozen
class Bundle:
    """A bundle by its place; makes no promise that it exists."""

    namespace: str
    id: str
    path: Path

    def record(self) -> ShimRecord:
        """What shim.json says now. Blocks.

        Raises:
            NotFound: there is none, or it is not a record.
        """
        data = self.read_json(SHIM_FILE)
        try:
            init = data.get("init") or (0, 0)
            return ShimRecord(
                instance_id=str(data["instance_id"]),
                namespace=str(data["namespace"]),
                id=str(data["id"]),
                socket=str(data["socket"]),
                boot_id=str(data["boot_id"]),
                pid=int(data.get("pid") or 0),
                start_time=int(data.get("start_time") or 0),
                group=str(data.get("group") or ""),
                sandbox=str(data.get("sandbox") or ""),
                binary=str(data.get("binary") or ""),
                address=str(data.get("address") or ""),
                init=(int(init[0]), int(init[1])),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise NotFound(f"{self.path / SHIM_FILE} does not describe a shim") from error

    def process(self) -> ProcessId | None:
        """The shim's process, if shim.json names one of this boot. Blocks."""
        try:
            record = self.record()
        except NotFound:
            return None
        if not record.pid or not record.start_time or record.boot_id != linux.boot_id():
            return None
        return ProcessId(record.pid, record.start_time)

    def complete(self, **fields: object) -> None:
        """Add to shim.json what became known of a shim that does not do so itself. Blocks."""
        self.write_json(SHIM_FILE, {**self.read_json(SHIM_FILE), **fields})

    def read_json(self, name: str) -> dict[str, Any]:
        """A file of the bundle that holds a JSON object. Blocks.

        Raises:
            NotFound: there is none, or it holds something else.
        """
        path = self.path / name
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise NotFound(f"{path} does not exist") from error
        except ValueError as error:
            raise NotFound(f"{path} is not JSON") from error
        if not isinstance(data, dict):
            raise NotFound(f"{path} does not hold an object")
        return data

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Write a file of the bundle, whole or not at all. Blocks."""
        _write(self.path / name, json.dumps(data).encode())

    def deletion(self) -> dict[str, Any] | None:
        """What ``begin_deletion`` noted; None when removal has not begun. Blocks."""
        try:
            return self.read_json(DELETING_FILE)
        except NotFound:
            return None

    def begin_deletion(self, note: dict[str, Any]) -> None:
        """Record that the bundle is on its way out, with what is needed to go on. Blocks."""
        self.write_json(DELETING_FILE, note)

    def exists(self) -> bool:
        """Whether the directory is there. Blocks."""
        return self.path.is_dir()

    def remove(self, *, shared: bool = False) -> None:
        """Unmount what is mounted beneath, and remove directory and socket. Blocks; idempotent.

        Args:
            shared: the socket stays, others are served there.

        Raises:
            OSError: something beneath is in use and cannot be unmounted.
        """
        unmount_beneath(self.path)
        if not shared:
            with contextlib.suppress(NotFound):
                Path(self.record().socket).unlink(missing_ok=True)
        rubbish = self.path.with_name(f".{self.id}.{secrets.token_hex(4)}")
        try:
            self.path.rename(rubbish)
        except FileNotFoundError:
            return
        shutil.rmtree(rubbish)


class Bundles:
    """Every bundle of this containerd, below ``<state>/tasks``.

    Args:
        state: containerd's state directory; sockets of shims lie in ``<state>/s``.
    """

    def __init__(self, state: Path) -> None:
        self._tasks = state / "tasks"
        self._sockets = state / "s"

    def find(self, namespace: str, id: str) -> Bundle:
        """The bundle of a task, whether it exists or not.

        Raises:
            InvalidArgument: one of the names cannot be a path's component.
        """
        checked_identifier(namespace, what="namespace", field="namespace")
        checked_identifier(id, what="container id", field="container_id")
        return Bundle(namespace, id, self._tasks / namespace / id)

    def socket(self, namespace: str, id: str, instance_id: str) -> Path:
        """Where the shim of a task listens, if it has a process of its own.

        The next task of this id has another: the process may still serve others there.

        Raises:
            InvalidArgument: the state directory's path is too long for a Unix socket.
        """
        digest = hashlib.sha256(f"{namespace}/{id}/{instance_id}".encode()).hexdigest()[:16]
        path = self._sockets / digest
        check_socket_path(path)
        return path

    def create(
        self, namespace: str, id: str, spec: bytes, binary: str = "", sandbox: str = ""
    ) -> ShimRecord:
        """Make the bundle of a new task, complete. Blocks.

        Args:
            namespace: the container's.
            id: the container's.
            spec: config.json, as the container record has it.
            binary: the program of a shim that others wrote; empty: the shim is ours.
            sandbox: the sandbox that it belongs to, or is; empty: none.

        Raises:
            InvalidArgument: a name, the socket's path or the spec is of no use.
            AlreadyExists: there is one.
            ResourceExhausted: the disk is full.
        """
        bundle = self.find(namespace, id)
        config = _parse_spec(spec)
        instance_id = secrets.token_hex(16)
        record = ShimRecord(
            instance_id=instance_id,
            namespace=namespace,
            id=id,
            socket=str(self.socket(namespace, id, instance_id)),
            boot_id=linux.boot_id(),
            group="" if binary else sandbox or group_of(config),
            sandbox=sandbox,
            binary=binary,
        )
        draft = bundle.path.with_name(f".{id}.{secrets.token_hex(4)}")
        try:
            self._make_draft(draft)
            # Whole or not at all, as the directory is.
            (draft / SHIM_FILE).write_bytes(json.dumps(plain(record)).encode())
            (draft / CONFIG_FILE).write_bytes(spec)
            (draft / "rootfs").mkdir(mode=0o711)
            _open_to_mapped_root(draft, config)
            draft.rename(bundle.path)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise AlreadyExists(f"bundle of task '{id}' already exists") from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceExhausted(f"no space for a bundle in {draft.parent}") from error
            raise
        return record

    def _make_draft(self, draft: Path) -> None:
        try:
            draft.mkdir(mode=0o700)
        except FileNotFoundError:  # it is the namespace's first
            self._sockets.mkdir(mode=0o711, parents=True, exist_ok=True)
            draft.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            draft.mkdir(mode=0o700)

    def all(self) -> list[Bundle]:
        """Every bundle there is; clears away rubbish of interrupted steps. Blocks."""
        bundles = []
        for path in self._directories():
            if path.name.startswith("."):
                unmount_beneath(path)
                shutil.rmtree(path)
            else:
                bundles.append(Bundle(path.parent.name, path.name, path))
        return bundles

    def _directories(self) -> Iterator[Path]:
        if not self._tasks.is_dir():
            return
        for namespace in sorted(self._tasks.iterdir()):
            if namespace.is_dir():
                yield from sorted(path for path in namespace.iterdir() if path.is_dir())


def unmount_beneath(directory: Path) -> None:
    """Unmount everything that is mounted at or below ``directory``, the newest first. Blocks.

    Busy ones are detached: they go when their last user does.
    """
    prefix = f"{os.path.realpath(directory)}/"
    targets = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = _unescape(line.split(" ", 5)[4])
        if f"{target}/".startswith(prefix):
            targets.append(target)
    for target in reversed(targets):
        try:
            linux.umount(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # not mounted any more
                raise


def _unescape(field: str) -> str:
    """A path of mountinfo: space, tab, newline and backslash are octal there (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _parse_spec(spec: bytes) -> dict[str, Any]:
    try:
        config = json.loads(spec)
    except ValueError as error:
        raise InvalidArgument("the container's spec is not JSON", field="spec") from error
    if not isinstance(config, dict):
        raise InvalidArgument("the container's spec is not an object", field="spec")
    return config


def _open_to_mapped_root(bundle: Path, config: dict[str, Any]) -> None:
    """Let the host's user that is root in the container's user namespace pass through."""
    section = config.get("linux")
    mappings = section.get("gidMappings") if isinstance(section, dict) else None
    for mapping in mappings if isinstance(mappings, list) else ():
        if isinstance(mapping, dict) and mapping.get("containerID") == 0:
            os.chown(bundle, -1, int(mapping.get("hostID") or 0))
            bundle.chmod(stat.S_IRWXU | stat.S_IXGRP)


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all.

    No fsync: what a crash of the machine takes is void after it anyway.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    small_files.replace(str(path), str(draft), data)
