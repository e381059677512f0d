"""Changes made in a mounted overlay, as a layer: applied anywhere, by whomever, they are the same.

Against GNU tar, which knows no whiteouts: what they name is removed before it unpacks the rest.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.mounts import Mount, as_readonly, temporary_mount
from services.containerd.diff.media_types import OCI_TAR
from services.containerd.diff.pack import pack_layer
from services.containerd.diff.unpack import unpack_layer
from services.containerd.snapshots.copy import copy_tree
from tests.fakes.layers import looks, read

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.root

NAMES = st.sampled_from(
    [
        *("file", "two", "dir", "dir/one", "dir/two", "dir/sub", "dir/sub/deep", "x y", ".wh"),
        *("new", "dir/new", "dir/sub/new", "new/new"),
    ]
)
_NO_DRIVER = 240  # devices.rst: for local use; opening it fails


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write(path: Path, data: bytes, flags: int = os.O_TRUNC, *, hole: int = 0) -> None:
    # A pipe is not waited for.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | flags)
    try:
        if hole:
            os.lseek(fd, hole, os.SEEK_SET)
        os.write(fd, data)
        if hole:
            os.ftruncate(fd, 3 * hole)
    finally:
        os.close(fd)


def anew(path: Path) -> None:
    remove(path)
    path.mkdir()


def move(path: Path, other: Path) -> None:
    subprocess.run(["mv", "-T", other, path], check=True, stderr=subprocess.DEVNULL)


# What a process in a container might do; some of it cannot be done there and then.
ACTS: dict[str, Callable[[Path, Path, int], object]] = {
    "write": lambda path, _, number: write(path, b"%d" % number * 100),
    "append": lambda path, _, number: write(path, b"%d" % number, os.O_APPEND),
    "sparse": lambda path, _, number: write(path, b"end", hole=(number + 1) << 16),
    "mkdir": lambda path, _, number: path.mkdir(0o700 | number),
    "anew": lambda path, _, number: anew(path),
    "symlink": lambda path, other, number: path.symlink_to(other.name),
    "link": lambda path, other, number: path.hardlink_to(other),
    "remove": lambda path, _, number: remove(path),
    "move": lambda path, other, number: move(path, other),
    "chmod": lambda path, _, number: path.chmod(0o4700 | number),
    "chown": lambda path, _, number: os.chown(path, 1000 + number, 7, follow_symlinks=False),
    "xattr": lambda path, _, number: os.setxattr(path, "user.key", bytes([number])),
    "fifo": lambda path, _, number: os.mkfifo(path, 0o600),
    "device": lambda path, _, number: os.mknod(path, stat.S_IFCHR, os.makedev(_NO_DRIVER, number)),
    "touch": lambda path, _, number: os.utime(path, ns=(number * 10**9, number * 10**9)),
}
ACTIONS = st.lists(
    st.tuples(st.sampled_from(sorted(ACTS)), NAMES, NAMES, st.integers(0, 7)), max_size=20
)


def live(root: Path, actions: list[tuple[str, str, str, int]]) -> None:
    for verb, name, other, number in actions:
        try:
            ACTS[verb](root / name, root / other, number)
        except (OSError, subprocess.CalledProcessError):
            continue


def begin(root: Path) -> None:
    """Something to be changed."""
    (root / "dir/sub").mkdir(parents=True)
    for name in ("file", "dir/one", "dir/two", "dir/sub/deep"):
        (root / name).write_text(name)
    (root / "two").hardlink_to(root / "dir/two")
    (root / "x y").symlink_to("dir")


class Place:
    """A directory with everything that a comparison needs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lower = self.new("lower")
        self.scratch = self.new("scratch")

    def new(self, name: str) -> Path:
        (self.directory / name).mkdir()
        return self.directory / name

    def over(self, name: str) -> list[Mount]:
        """An overlay on the lower directory."""
        upper, work = self.new(name), self.new(f"{name}-work")
        options = (f"workdir={work}", f"upperdir={upper}", f"lowerdir={self.lower}", "index=off")
        return [Mount("overlay", "overlay", options=options)]

    def below(self) -> list[Mount]:
        return [Mount("bind", str(self.lower), options=("ro", "rbind"))]

    def copy(self, name: str) -> Path:
        """A copy of the lower directory, as a native snapshot is."""
        copy_tree(self.lower, self.new(name))
        return self.directory / name

    def pack(self, lower: list[Mount], upper: list[Mount]) -> bytes:
        output = self.directory / "layer"
        pack_layer(lower, upper, output, media_type=OCI_TAR, newest_ns=None, scratch=self.scratch)
        return output.read_bytes()

    def unpack(self, layer: bytes, mounts: list[Mount]) -> None:
        (self.directory / "blob").write_bytes(layer)
        unpack_layer(self.directory / "blob", mounts, scratch=self.scratch, sync=False)

    def seen(self, mounts: list[Mount]) -> dict[str, tuple[object, ...]]:
        with temporary_mount([as_readonly(m) for m in mounts], self.scratch) as root:
            return looks(root, times=False)


def without_links(seen: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    """The same, but for which files are one: walking finds no link that was broken by a touch."""
    return {name: (*seen_of[:8], seen_of[9]) for name, seen_of in seen.items()}


def with_gnu_tar(layer: bytes, root: Path) -> None:
    """Apply a layer as its specification says, with tar(1) for all but the whiteouts."""
    for entry in read(layer):
        above, _, base = entry.name.rpartition("/")
        if base == ".wh..wh..opq":
            for path in (root / above).glob("*"):
                remove(path)
        elif base.startswith(".wh."):
            remove(root / above / base.removeprefix(".wh."))
        elif (root / entry.name).is_symlink() or (root / entry.name).exists():
            path = root / entry.name
            if not (path.is_dir() and not path.is_symlink() and entry.kind == b"5"):
                remove(path)
    subprocess.run(
        ["tar", "--xattrs", "--xattrs-include=*", "--same-owner", "-xpf", "-", "--exclude=.wh.*"],
        input=layer,
        cwd=root,
        check=True,
    )


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ACTIONS, ACTIONS)
def test_changes_are_the_same_wherever_they_are_applied(
    tmp_path: Path,
    before: list[tuple[str, str, str, int]],
    then: list[tuple[str, str, str, int]],
) -> None:
    umask = os.umask(0)
    try:
        with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
            place = Place(Path(directory))
            begin(place.lower)
            live(place.lower, before)
            container = place.over("container")
            with temporary_mount(container, place.scratch) as root:
                live(root, then)
            wanted = place.seen(container)
            layer = place.pack(place.below(), container)
            assert place.pack(place.below(), container) == layer
            # Into another overlay, and into a copy of the tree.
            other = place.over("other")
            place.unpack(layer, other)
            assert place.seen(other) == wanted
            native = place.copy("native")
            place.unpack(layer, [Mount("bind", str(native), options=("rw", "rbind"))])
            assert looks(native, times=False) == wanted
            # By another program.
            by_tar = place.copy("by-tar")
            with_gnu_tar(layer, by_tar)
            assert looks(by_tar, times=False) == wanted
            # What is found by walking two trees does the same as what an overlay has noted.
            walked = place.pack(
                place.below(), [Mount("bind", str(native), options=("rw", "rbind"))]
            )
            last = place.over("last")
            place.unpack(walked, last)
            assert without_links(place.seen(last)) == without_links(wanted)
    finally:
        os.umask(umask)
