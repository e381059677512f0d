"""A layer's entries made into files below one directory (OCI image-spec, layer.md).

The directory is either a plain view of the whole tree, where a whiteout removes what it names, or
the upper directory of an overlay, where a whiteout becomes what overlayfs takes for one: a
character device 0:0, or the attribute ``trusted.overlay.opaque`` on a directory.

Names are resolved inside the directory (see :mod:`.rooted`). It is meant for a process of its own:
the umask is expected to be 0, and everything blocks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from services.common import linux
from services.common.errors import (
    DataLoss,
    InvalidArgument,
    PermissionDenied,
    ResourceExhausted,
    TheseusError,
)
from services.containerd.diff import reader
from services.containerd.diff.applier import LowerNeeded
from services.containerd.diff.attributes import (
    OPAQUE_ATTRIBUTE,
    OVERLAY_ATTRIBUTES,
    SPECIAL_BITS,
    set_xattrs,
    times,
)
from services.containerd.diff.flusher import Flusher
from services.containerd.diff.rooted import Directory, RootedTree, clean, status

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from services.containerd.diff.reader import Entry, TarReader

_WHITEOUT = ".wh."
_WHITEOUT_META = ".wh..wh."
_OPAQUE_MARK = ".wh..wh..opq"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_ID = (1 << 32) - 2  # -1 means "leave it" to chown(2)
_MAX_LINKS_FOLLOWED = 40  # as path_resolution(7)

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EPERM, errno.EACCES, errno.EROFS)
_BAD_ENTRY = (
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EMLINK,
    errno.EFBIG,
    errno.EILSEQ,
    errno.EBUSY,
    errno.E2BIG,
    errno.ERANGE,
    errno.EOPNOTSUPP,
)


class LayerApplier:
    """Writes one layer below ``root``. Use it once, as a context manager.

    Args:
        root: where to.
        overlay: whether ``root`` is the upper directory of an overlay.
        lower: the overlay's lower directories, top first: where a directory that the layer does not
            have itself, but something in it, gets its attributes from.
        merged: mounts the overlay for a moment, for a hard link to a file of a lower directory.
        detached: refuse what needs a lower directory, because those are not there yet.
    """

    def __init__(
        self,
        root: Path,
        *,
        overlay: bool = False,
        lower: list[Path] | None = None,
        merged: Callable[[], AbstractContextManager[Path]] | None = None,
        detached: bool = False,
    ) -> None:
        self._tree = RootedTree(root)
        self._overlay = overlay
        self._lower_paths = lower or []
        self._lower: list[RootedTree] | None = None
        self._merged = merged
        self._detached = detached
        self._made: set[str] = set()  # names that this layer has brought
        self._flusher = Flusher(self._tree.root.fd)
        self._directory_times: dict[str, tuple[int, int]] = {}
        self._makers: dict[bytes, Callable[[Entry, TarReader, Directory, str], None]] = {
            reader.REGULAR: self._make_file,
            reader.HARDLINK: self._make_hardlink,
            reader.SYMLINK: self._make_symlink,
            reader.CHARACTER: self._make_special,
            reader.BLOCK: self._make_special,
            reader.FIFO: self._make_special,
        }

    def __enter__(self) -> LayerApplier:
        return self

    def __exit__(self, *_: object) -> None:
        self._flusher.finish()
        self._tree.close()
        for tree in self._lower or []:
            tree.close()

    def apply(self, entries: TarReader) -> None:
        """Write all entries.

        Raises:
            TheseusError: as ``Applier.apply`` says.
        """
        for entry in entries:
            self._tree.release()
            name = clean(entry.name)
            if not name:
                continue  # the root's attributes are the snapshotter's business
            try:
                self._apply_one(entry, entries, name)
            except OSError as error:
                raise _explained(error, entry) from error
            except RecursionError as error:
                raise InvalidArgument(f"a name in the layer is too deep: {name[:128]!r}") from error
        self._set_directory_times()
        if (unwritten := self._flusher.finish()) is not None:
            raise _unwritten(unwritten) from unwritten

    def sync(self) -> None:
        """Bring the file system written to to the disk."""
        linux.syncfs(self._tree.root.fd)

    def _apply_one(self, entry: Entry, data: TarReader, name: str) -> None:
        parent_name, _, base = name.rpartition("/")
        if base.startswith(_WHITEOUT):
            self._white_out(parent_name, base)
            return
        if not 0 <= entry.uid <= _MAX_ID or not 0 <= entry.gid <= _MAX_ID:
            raise InvalidArgument(
                f"entry {entry.name!r} has owner {entry.uid}:{entry.gid}, which cannot be"
            )
        parent = self._parent(parent_name)
        if entry.kind == reader.DIRECTORY:
            self._make_directory(entry, parent, name, base)
        else:
            self._makers[entry.kind](entry, data, parent, base)
        self._made.add(name)

    def _make_file(self, entry: Entry, data: TarReader, parent: Directory, base: str) -> None:
        try:
            fd = os.open(base, _NEW_FILE, entry.mode & 0o777, dir_fd=parent.fd)
        except FileExistsError:
            self._clear(parent, base)
            fd = os.open(base, _NEW_FILE, entry.mode & 0o777, dir_fd=parent.fd)
        try:
            if entry.size_bytes:
                data.copy(fd)
                self._flusher.wrote(entry.size_bytes)
            if entry.uid or entry.gid or parent.passes_on:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                set_xattrs(fd, entry)
            if entry.mode & SPECIAL_BITS or parent.passes_on:
                os.fchmod(fd, entry.mode)  # after chown, which takes the set-ID bits away
            os.utime(fd, ns=times(entry))
        finally:
            os.close(fd)

    def _make_directory(self, entry: Entry, parent: Directory, name: str, base: str) -> None:
        opaque = self._mkdir(parent, base, entry.mode & 0o777)
        directory = self._tree.enter(name, parent, base)
        if opaque:
            os.setxattr(directory.fd, OPAQUE_ATTRIBUTE, b"y")
        os.fchown(directory.fd, entry.uid, entry.gid)
        if entry.xattrs:
            set_xattrs(directory.fd, entry)
        os.fchmod(directory.fd, entry.mode)
        if entry.mode & stat.S_ISGID or entry.xattrs:
            self._tree.refresh(name)
        # Set at the end: each entry made in it changes its time.
        self._directory_times[name] = times(entry)

    def _make_symlink(self, entry: Entry, _data: TarReader, parent: Directory, base: str) -> None:
        try:
            os.symlink(entry.linkname, base, dir_fd=parent.fd)
        except FileExistsError:
            self._clear(parent, base)
            os.symlink(entry.linkname, base, dir_fd=parent.fd)
        self._finish(entry, parent, base)

    def _make_special(self, entry: Entry, _data: TarReader, parent: Directory, base: str) -> None:
        types = {reader.CHARACTER: stat.S_IFCHR, reader.BLOCK: stat.S_IFBLK}
        mode = types.get(entry.kind, stat.S_IFIFO) | entry.mode & 0o777
        try:
            device = os.makedev(*entry.device)
        except (OverflowError, ValueError) as error:
            raise InvalidArgument(f"entry {entry.name!r} is a device that cannot be") from error
        try:
            os.mknod(base, mode, device, dir_fd=parent.fd)
        except FileExistsError:
            self._clear(parent, base)
            os.mknod(base, mode, device, dir_fd=parent.fd)
        self._finish(entry, parent, base)

    def _make_hardlink(self, entry: Entry, _data: TarReader, parent: Directory, base: str) -> None:
        target_parent, _, target = clean(entry.linkname).rpartition("/")
        source, found = self._link_source(target_parent, target)
        if source is None or found is None:
            if not self._link_to_lower(entry):
                raise InvalidArgument(
                    f"hard link {entry.name!r} names {entry.linkname!r}, which is not in the layer "
                    "and not below it"
                )
            return
        if stat.S_ISDIR(found.st_mode):
            raise InvalidArgument(f"hard link {entry.name!r} names a directory")
        there = status(parent, base)
        if there is not None:
            if (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino):
                return
            self._tree.remove(parent, base, there.st_mode)
        os.link(target, base, src_dir_fd=source.fd, dst_dir_fd=parent.fd, follow_symlinks=False)

    def _link_source(
        self, parent_name: str, base: str
    ) -> tuple[Directory | None, os.stat_result | None]:
        try:
            directory = self._tree.directory(parent_name)
        except (FileNotFoundError, NotADirectoryError):
            return None, None
        found = status(directory, base) if base else None
        if found is not None and self._overlay and _is_whiteout(found):
            found = None
        return directory, found

    def _link_to_lower(self, entry: Entry) -> bool:
        """Let overlayfs copy a lower directory's file up and link it; False if there is none."""
        if self._detached:
            raise LowerNeeded(f"hard link {entry.name!r} names what is not in the layer")
        if not self._overlay or self._merged is None or not self._lower_paths:
            return False
        # Upper directories must not be changed behind a mounted overlay's back, so it is mounted
        # for this one link only.
        with self._merged() as root, LayerApplier(root) as plain:
            parent_name, _, base = clean(entry.name).rpartition("/")
            directory = plain._parent(parent_name)
            target_parent, _, target = clean(entry.linkname).rpartition("/")
            source, found = plain._link_source(target_parent, target)
            if source is None or found is None or stat.S_ISDIR(found.st_mode):
                return False
            plain._clear(directory, base)
            os.link(
                target, base, src_dir_fd=source.fd, dst_dir_fd=directory.fd, follow_symlinks=False
            )
        return True

    def _white_out(self, parent_name: str, base: str) -> None:
        if base == _OPAQUE_MARK:
            self._make_opaque(parent_name)
            return
        if base.startswith(_WHITEOUT_META):
            return  # aufs' own notes
        hidden = base.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            raise InvalidArgument(f"whiteout {base!r} hides nothing that can be")
        name = f"{parent_name}/{hidden}" if parent_name else hidden
        if self._overlay:
            self._hide(self._parent(parent_name), name, hidden)
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            parent = self._tree.directory(parent_name)
            # What the layer brings itself stays: a whiteout hides what was there before.
            if name not in self._made and (found := status(parent, hidden)) is not None:
                self._tree.remove(parent, hidden, found.st_mode)

    def _hide(self, parent: Directory, name: str, base: str) -> None:
        """Hide a lower directory's entry from the overlay."""
        found = status(parent, base)
        if found is not None and name in self._made:
            if stat.S_ISDIR(found.st_mode):
                directory = self._tree.enter(name, parent, base)
                os.setxattr(directory.fd, OPAQUE_ATTRIBUTE, b"y")
            return
        if found is not None:
            self._tree.remove(parent, base, found.st_mode)
        os.mknod(base, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent.fd)

    def _make_opaque(self, name: str) -> None:
        """Hide all of a directory's entries except those that the layer brings."""
        if self._overlay:
            os.setxattr(self._parent(name).fd, OPAQUE_ATTRIBUTE, b"y")
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._empty(name, self._tree.directory(name))

    def _empty(self, name: str, directory: Directory) -> None:
        with os.scandir(directory.fd) as found:
            bases = [entry.name for entry in found]
        for base in bases:
            child = f"{name}/{base}" if name else base
            found_status = status(directory, base)
            if found_status is None:
                continue
            if child not in self._made:
                self._tree.remove(directory, base, found_status.st_mode)
            elif stat.S_ISDIR(found_status.st_mode):
                fd = os.open(base, _OPEN_DIRECTORY, dir_fd=directory.fd)
                try:
                    self._empty(child, Directory(fd, passes_on=False))
                finally:
                    os.close(fd)

    def _clear(self, parent: Directory, base: str) -> bool:
        """Make room for a new entry; returns whether it was a whiteout that had to go."""
        found = status(parent, base)
        if found is None:
            return False
        self._tree.remove(parent, base, found.st_mode)
        return self._overlay and _is_whiteout(found)

    def _mkdir(self, parent: Directory, base: str, mode: int) -> bool:
        """Make a directory unless it is there; returns whether it has to become opaque.

        It has to if it takes the place of a whiteout, which would not hide the lower directory of
        that name any more.
        """
        try:
            os.mkdir(base, mode, dir_fd=parent.fd)
        except FileExistsError:
            found = status(parent, base)
            if found is not None and stat.S_ISDIR(found.st_mode):
                return False
            opaque = self._clear(parent, base)
            os.mkdir(base, mode, dir_fd=parent.fd)
            return opaque
        return False

    def _parent(self, name: str, followed: int = 0) -> Directory:
        """A directory that an entry is to be made in; it is made, too, if it is not there."""
        try:
            return self._tree.directory(name)
        except (FileNotFoundError, NotADirectoryError):
            if followed > _MAX_LINKS_FOLLOWED:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from None
        above, _, base = name.rpartition("/")
        parent = self._parent(above, followed)
        found = status(parent, base)
        if found is not None and stat.S_ISLNK(found.st_mode):
            # It leads to what does not exist yet, which is inside all the same.
            target = os.readlink(base, dir_fd=parent.fd)
            return self._parent(clean(posixpath.join("/", above, target)), followed + 1)
        if found is not None and not (self._overlay and _is_whiteout(found)):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        opaque = self._mkdir(parent, base, 0o755)
        directory = self._tree.enter(name, parent, base)
        if opaque:
            os.setxattr(directory.fd, OPAQUE_ATTRIBUTE, b"y")
        else:
            self._copy_lower_attributes(name, directory)
        return directory

    def _copy_lower_attributes(self, name: str, directory: Directory) -> None:
        """Give a directory that the layer only implies the looks of the one it covers."""
        if self._detached:
            raise LowerNeeded(f"directory {name!r} is not in the layer, but something in it is")
        if self._lower is None:
            self._lower = [RootedTree(path) for path in self._lower_paths]
        for tree in self._lower:
            tree.release()
            try:
                lower = tree.directory(name)
            except FileNotFoundError:
                continue
            except OSError:
                return  # covered by something that is no directory
            found = os.fstat(lower.fd)
            os.fchown(directory.fd, found.st_uid, found.st_gid)
            for attribute in os.listxattr(lower.fd):
                if not attribute.startswith(OVERLAY_ATTRIBUTES):
                    os.setxattr(directory.fd, attribute, os.getxattr(lower.fd, attribute))
            os.fchmod(directory.fd, stat.S_IMODE(found.st_mode))
            self._tree.refresh(name)
            self._directory_times[name] = (found.st_atime_ns, found.st_mtime_ns)
            return

    def _finish(self, entry: Entry, parent: Directory, base: str) -> None:
        """Owner, attributes, mode and times of what cannot be opened."""
        if entry.uid or entry.gid or parent.passes_on:
            os.chown(base, entry.uid, entry.gid, dir_fd=parent.fd, follow_symlinks=False)
        needs_mode = entry.kind != reader.SYMLINK and (
            entry.mode & SPECIAL_BITS or parent.passes_on
        )
        if entry.xattrs or needs_mode:
            handle = os.open(base, _HANDLE, dir_fd=parent.fd)
            try:
                # Through proc(5) a handle stands for the entry itself, a symbolic link included.
                set_xattrs(f"/proc/self/fd/{handle}", entry)
                if needs_mode:
                    Path(f"/proc/self/fd/{handle}").chmod(entry.mode)
            finally:
                os.close(handle)
        os.utime(base, ns=times(entry), dir_fd=parent.fd, follow_symlinks=False)

    def _set_directory_times(self) -> None:
        for name, both in self._directory_times.items():
            self._tree.release()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.utime(self._tree.directory(name).fd, ns=both)


def _is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _unwritten(error: OSError) -> TheseusError:
    """What it means that the kernel could not write to the disk what it had taken."""
    text = f"the layer could not be written to the disk: {error.strerror}"
    if error.errno in _OUT_OF_SPACE:
        return ResourceExhausted(f"{text}; make room and try again")
    return DataLoss(f"{text}; look for the disk's errors in the kernel's log")


def _explained(error: OSError, entry: Entry) -> TheseusError | OSError:
    """What a failed call means for the one who wanted the layer."""
    text = f"entry {entry.name!r} of the layer: {error.strerror}"
    if error.errno in _OUT_OF_SPACE:
        return ResourceExhausted(f"{text}; make room and try again")
    if error.errno in _NOT_ALLOWED:
        return PermissionDenied(text)
    if error.errno in _BAD_ENTRY:
        return InvalidArgument(text)
    return error
