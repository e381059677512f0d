"""Calls to the kernel that Python has no binding for: constants, argument types, one errno helper.

Each function wraps one call faithfully and holds no policy. Constants are named as in the headers.
Man pages: mount(2), umount2(2), prctl(2), mmap(2), madvise(2), openat2(2), syncfs(2), setns(2),
unshare(2), inotify(7), pidfd_open(2), ioctl_pidfd(2), fsopen(2), fsconfig(2), fsmount(2),
move_mount(2), open_tree(2), mount_setattr(2), clone(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import struct
from functools import cache
from pathlib import Path

from services.common import small_files
from services.common.frozen import frozen

MADV_MERGEABLE = 12
MADV_COLLAPSE = 25
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_MANDLOCK = 0x40
MS_DIRSYNC = 0x80
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_MOVE = 0x2000
MS_REC = 0x4000
MS_UNBINDABLE = 0x20000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MS_RELATIME = 0x200000
MS_STRICTATIME = 0x1000000

MNT_FORCE = 0x1
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

M_ARENA_MAX = -8

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000
MOVE_MOUNT_F_EMPTY_PATH = 0x4

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

IN_MODIFY = 0x002
IN_ATTRIB = 0x004
IN_CLOSE_WRITE = 0x008
IN_MOVED_FROM = 0x040
IN_MOVED_TO = 0x080
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800

# System calls added since Linux 5.1 have the same number on every architecture but alpha.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_CLONE3 = 435
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

_MAP_FAILED = ctypes.c_void_p(-1).value
PROT_NONE = 0
MAP_FIXED = 0x10
_OPEN_TREE_CLONE = 0x1
_AT_EMPTY_PATH = 0x1000
_CLONE_CLEAR_SIGHAND = 0x1_0000_0000
_WALL = 0x40000000  # wait(2): children that send no signal when they end, too

# linux/pidfd.h, struct pidfd_info version 2 (64 bytes): mask, cgroupid, pid, tgid, ppid, ruid,
# rgid, euid, egid, suid, sgid, fsuid, fsgid, exit_code
_PIDFD_INFO = struct.Struct("=QQIIIIIIIIIIIi")
_PIDFD_GET_INFO = (3 << 30) | (_PIDFD_INFO.size << 16) | (0xFF << 8) | 11
PIDFD_INFO_EXIT = 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)
_libc_held = ctypes.PyDLL(None, use_errno=True)
_libc_held.syscall.restype = ctypes.c_long
_libc.mount.argtypes = [
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_ThreadName = ctypes.c_char * 16
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.inotify_init1.argtypes = [ctypes.c_int]
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
_libc.inotify_rm_watch.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.malloc.restype = ctypes.c_void_p


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


@frozen
class InotifyEvent:
    """One event of inotify(7): the watch it belongs to, its mask, and the entry's name."""

    watch: int
    mask: int
    name: str


def mount(
    source: str, target: str | Path, *, fstype: str = "", flags: int = 0, data: str = ""
) -> None:
    """Call mount(2). ``data`` is the file system's own option string, at most a page long."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            fstype.encode() or None,
            flags,
            data.encode() or None,
        ),
        str(target),
    )


def umount(target: str | Path, flags: int = 0) -> None:
    """Unmount ``target`` (umount2(2))."""
    _check(_libc.umount2(os.fsencode(target), flags), str(target))


def fsopen(fstype: str) -> int:
    """Begin to configure a new file system; the caller closes the descriptor.

    Reading that gives the kernel's messages about what is wrong, one a call: see fsopen(2).
    """
    fd: int = _libc.syscall(
        ctypes.c_long(_SYS_FSOPEN), ctypes.c_char_p(fstype.encode()), ctypes.c_uint(FSOPEN_CLOEXEC)
    )
    return _check(fd, fstype)


def fsconfig(fd: int, command: int, key: str = "", value: str = "") -> None:
    """Set a parameter of a file system under configuration, or create it (fsconfig(2))."""
    _check(
        _libc.syscall(
            ctypes.c_long(_SYS_FSCONFIG),
            ctypes.c_int(fd),
            ctypes.c_uint(command),
            ctypes.c_char_p(key.encode() or None),
            ctypes.c_char_p(os.fsencode(value) or None),
            ctypes.c_int(0),
        ),
        key,
    )


def fsmount(fd: int, attributes: int = 0) -> int:
    """A detached mount of a file system that was created (fsmount(2)); the caller closes it."""
    mount_fd: int = _libc.syscall(
        ctypes.c_long(_SYS_FSMOUNT),
        ctypes.c_int(fd),
        ctypes.c_uint(FSMOUNT_CLOEXEC),
        ctypes.c_uint(attributes),
    )
    return _check(mount_fd, "fsmount")


def clone_tree(path: str | Path) -> int:
    """A detached copy of the mount at ``path`` (open_tree(2)); the caller closes it."""
    fd: int = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_int(-100),  # AT_FDCWD
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC),
    )
    return _check(fd, str(path))


def idmap_mount(mount_fd: int, userns_fd: int, *, attributes: int = 0) -> None:
    """Map owners on a detached mount as a user namespace does (mount_setattr(2)).

    What the file system says is 0 is shown as the id that the namespace's root has outside.
    """
    wanted = _MountAttr(MOUNT_ATTR_IDMAP | attributes, 0, 0, userns_fd)
    _check(
        _libc.syscall(
            ctypes.c_long(_SYS_MOUNT_SETATTR),
            ctypes.c_int(mount_fd),
            ctypes.c_char_p(b""),
            ctypes.c_uint(_AT_EMPTY_PATH),
            ctypes.byref(wanted),
            ctypes.c_size_t(ctypes.sizeof(wanted)),
        ),
        "mount_setattr",
    )


def user_namespace(uid_map: str, gid_map: str) -> int:
    """A descriptor of a new user namespace with those maps (user_namespaces(7)).

    The caller closes it. The namespace is made by a child that does nothing and is gone on return.
    It sends no signal when it ends, so that nobody who waits for children of his own gets it; what
    it has of this process is never used, whatever other threads were at.
    """
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, its size, tls
    wanted = (ctypes.c_uint64 * 8)(CLONE_NEWUSER | _CLONE_CLEAR_SIGHAND)
    # Not through _libc, which lets other threads run: one would own the child's interpreter.
    pid: int = _libc_held.syscall(
        ctypes.c_long(_SYS_CLONE3), ctypes.byref(wanted), ctypes.c_size_t(ctypes.sizeof(wanted))
    )
    if pid == 0:  # pragma: no cover (the child)
        while True:
            _libc_held.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            _libc_held.pause()
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "clone3")
    try:
        for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
            Path(f"/proc/{pid}/{name}").write_text(text)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, _WALL)


def move_mount(mount_fd: int, target: str | Path) -> None:
    """Attach a detached mount at ``target`` (move_mount(2))."""
    _check(
        _libc.syscall(
            ctypes.c_long(_SYS_MOVE_MOUNT),
            ctypes.c_int(mount_fd),
            ctypes.c_char_p(b""),
            ctypes.c_int(-100),  # AT_FDCWD
            ctypes.c_char_p(os.fsencode(target)),
            ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
        ),
        str(target),
    )


def set_child_subreaper() -> None:
    """Make this process the reaper of its orphaned descendants (prctl(2))."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def set_child_subreaper_off() -> None:
    """Be the reaper of none but this process' own children again (prctl(2))."""
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def mallopt(parameter: int, value: int) -> None:
    """Set a parameter of the C library's allocator (mallopt(3)); other libraries ignore it."""
    _libc.mallopt(parameter, value)


def malloc(size: int) -> int:
    """Address of ``size`` bytes of the C library's heap (malloc(3)), never freed."""
    return _libc.malloc(size) or 0


def mmap(address: int, length: int, protection: int, flags: int, fd: int) -> int:
    """Map a file from its beginning, at ``address`` if MAP_FIXED says so (mmap(2))."""
    found = _libc.mmap(address, length, protection, flags, fd, 0) or 0
    return _check(-1 if found == _MAP_FAILED else found, "mmap")


def munmap(address: int, length: int) -> None:
    """Unmap what is mapped in a range of addresses (mmap(2))."""
    _check(_libc.munmap(address, length), "munmap")


def madvise(address: int, length: int, advice: int) -> None:
    """Say how a range of this process' memory is to be treated (madvise(2))."""
    _check(_libc.madvise(address, length, advice), "madvise")


def set_parent_death_signal(signum: int) -> None:
    """Have the kernel send ``signum`` to this process when its parent thread ends (prctl(2))."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0), "PR_SET_PDEATHSIG")


def set_process_name(name: str) -> None:
    """Set the calling thread's name as ps(1) shows it, cut at 15 bytes (prctl(2))."""
    buffer = _ThreadName.from_buffer_copy(name.encode()[:15].ljust(16, b"\0"))
    _check(_libc.prctl(PR_SET_NAME, ctypes.addressof(buffer), 0, 0, 0), "PR_SET_NAME")


def openat2(
    path: str | bytes, flags: int, *, dir_fd: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT
) -> int:
    """Open, by openat2(2), ``path`` with ``dir_fd`` as its root; O_CLOEXEC is added.

    Retries EAGAIN, which the kernel answers when a rename raced with the resolution of ``..``.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    name = os.fsencode(path)
    for _ in range(128):
        fd: int = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(dir_fd),
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
            break
    return _check(fd, os.fsdecode(path))


def syncfs(fd: int) -> None:
    """Write, by syncfs(2), the whole file system that ``fd`` lies on to its disk."""
    _check(_libc.syncfs(fd), "syncfs")


def setns(fd: int, nstype: int = 0) -> None:
    """Call setns(2). Namespaces belong to threads: for a child, or a thread that ends with it."""
    _check(_libc.setns(fd, nstype), "setns")


def unshare(flags: int) -> None:
    """Call unshare(2). Namespaces belong to threads: for a child, or a thread that ends with it."""
    _check(_libc.unshare(flags), "unshare")


def inotify_init() -> int:
    """A new inotify(7) descriptor, non-blocking and close-on-exec; the caller closes it."""
    return _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")


def inotify_add_watch(fd: int, path: str | Path, mask: int) -> int:
    """Watch ``path`` (inotify_add_watch(2)); returns the watch descriptor."""
    return _check(_libc.inotify_add_watch(fd, os.fsencode(path), mask), str(path))


def inotify_remove_watch(fd: int, watch: int) -> None:
    """End a watch; one that ended with its directory is passed over (inotify_rm_watch(2))."""
    if _libc.inotify_rm_watch(fd, watch) < 0 and ctypes.get_errno() != errno.EINVAL:
        _check(-1, "inotify_rm_watch")


def inotify_read(fd: int) -> list[InotifyEvent]:
    """All events that wait on a non-blocking inotify descriptor; empty when there are none."""
    try:
        data = os.read(fd, 65536)
    except BlockingIOError:
        return []
    events = []
    position = 0
    while position < len(data):
        watch, mask, _cookie, length = struct.unpack_from("iIII", data, position)
        position += 16
        name = data[position : position + length].rstrip(b"\0")
        events.append(InotifyEvent(watch, mask, os.fsdecode(name)))
        position += length
    return events


def pidfd_exit_status(pidfd: int) -> int | None:
    """The wait status of a process that has ended, from its pidfd, even when it is not our child.

    Returns:
        The status as ``os.waitstatus_to_exitcode`` takes it; None while the process runs, or
        where the kernel cannot tell (before Linux 6.15, or the record is gone).
    """
    buffer = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(buffer, 0, PIDFD_INFO_EXIT, *[0] * 13)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOTTY, errno.EINVAL):
            return None
        raise
    fields = _PIDFD_INFO.unpack(buffer)
    return int(fields[13]) if fields[0] & PIDFD_INFO_EXIT else None


def process_start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc(5), stat field 22).

    With the pid it names one process for ever, since a pid alone is used again. None when there
    is no such process, or it is a zombie.
    """
    try:
        stat = small_files.read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


@cache
def boot_id() -> str:
    """The kernel's random id of this boot (random(4)): state from another boot is void."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
