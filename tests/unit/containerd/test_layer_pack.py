"""Layers made from trees: what is in them, and that unpacking them gives the trees again."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import tarfile
import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import FailedPrecondition, Unimplemented
from services.common.mounts import Mount
from services.containerd.diff import reader
from services.containerd.diff.media_types import OCI_GZIP, OCI_TAR, OCI_ZSTD
from services.containerd.diff.pack import pack_layer
from tests.fakes.layers import Member, folder, hardlink, layer, looks, read, symlink, unpack

pytestmark = pytest.mark.root


def bind(path: Path) -> list[Mount]:
    return [Mount("bind", str(path), options=("rw", "rbind"))]


def overlay(upper: Path, *lower: Path) -> list[Mount]:
    layers = ":".join(map(str, lower))
    return [Mount("overlay", "overlay", options=(f"upperdir={upper}", f"lowerdir={layers}"))]


def pack(
    lower: list[Mount],
    upper: list[Mount],
    tmp_path: Path,
    media_type: str = OCI_TAR,
    newest_ns: int | None = None,
) -> bytes:
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    pack_layer(lower, upper, output, media_type=media_type, newest_ns=newest_ns, scratch=scratch)
    assert sorted(path.name for path in scratch.iterdir()) in ([], ["empty"])
    return output.read_bytes()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with something of every kind."""
    tree = tmp_path / "tree"
    tree.mkdir()
    unpack(
        layer(
            [
                folder("d", 0o1777, uid=3, mtime=1000),
                Member("d/" + "long" * 40, b"x" * 3000, mode=0o4755, gid=70000),
                Member("d/ümlaut\n", b"y", pax={"SCHILY.xattr.user.key": "a=b\nc"}),
                hardlink("link", "d/ümlaut\n"),
                symlink("soft", "to" * 80),
                Member("null", type=tarfile.CHRTYPE, device=(1, 3)),
                Member("pipe", type=tarfile.FIFOTYPE, mode=0o600),
                Member("big-id", uid=2**31, mtime=2**33 + 5),
            ]
        ),
        tree,
    )
    return tree


def test_a_tree_comes_back_as_it_was(tree: Path, tmp_path: Path) -> None:
    data = pack([], bind(tree), tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    unpack(data, copy)
    assert looks(copy) == looks(tree)


def test_the_same_tree_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    data = pack([], bind(tree), tmp_path, OCI_GZIP)
    copy = tmp_path / "copy"
    copy.mkdir()
    unpack(data, copy)
    assert pack([], bind(copy), tmp_path, OCI_GZIP) == data


def test_other_programs_can_read_it(tree: Path, tmp_path: Path) -> None:
    data = pack([], bind(tree), tmp_path)
    (tmp_path / "file").write_bytes(data)
    with tarfile.open(tmp_path / "file") as tar:
        names = [info.name for info in tar]
        assert tar.getmember("d/ümlaut\n").pax_headers["SCHILY.xattr.user.key"] == "a=b\nc"
        assert tar.getmember("big-id").uid == 2**31
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("media_type", "open_up"),
    [(OCI_TAR, bytes), (OCI_GZIP, gzip.decompress), (OCI_ZSTD, None)],
)
def test_compression(tree: Path, tmp_path: Path, media_type: str, open_up: object) -> None:
    plain = pack([], bind(tree), tmp_path)
    data = pack([], bind(tree), tmp_path, media_type)
    if open_up is None:
        assert zstandard.ZstdDecompressor().decompressobj().decompress(data) == plain
    else:
        assert open_up(data) == plain  # type: ignore[operator]


def test_an_unknown_media_type_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(Unimplemented, match="'text/plain'"):
        pack([], bind(tree), tmp_path, "text/plain")


def test_an_upper_directory_is_read_by_itself(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    (lower / "d").mkdir(parents=True)
    (lower / "d/old").write_text("old")
    upper.mkdir()
    unpack(
        layer(
            [
                folder("d"),
                Member("d/.wh..wh..opq"),
                Member("d/new", b"new"),
                Member(".wh.gone"),
                Member("sub/.wh.gone"),
            ]
        ),
        upper,
        overlay=True,
    )
    before = [Mount("bind", str(lower), options=("ro", "rbind"))]
    data = pack(before, overlay(upper, lower), tmp_path)
    assert [entry.name for entry in read(data)] == [
        "d/",
        "d/.wh..wh..opq",
        "d/new",
        ".wh.gone",
        "sub/",
        "sub/.wh.gone",
    ]
    again = tmp_path / "again"
    again.mkdir()
    unpack(data, again, overlay=True)
    assert looks(again, times=False) == looks(upper, times=False)


def test_a_committed_snapshot_is_compared_with_its_parent(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for path in (a, b, c):
        path.mkdir()
        (path / path.name).touch()
    view = [Mount("overlay", "overlay", options=(f"lowerdir={c}:{b}:{a}",))]
    below = [Mount("overlay", "overlay", options=(f"lowerdir={b}:{a}",))]
    assert [entry.name for entry in read(pack(below, view, tmp_path))] == ["c"]


def test_trees_that_are_not_stacked_are_compared_side_by_side(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    members = [
        folder("same"),
        Member("same/file", b"x"),
        folder("deep/er"),
        Member("deep/er/changed", b"abc"),
        Member("deep/kept"),
        Member("gone"),
        folder("gone-dir"),
        Member("gone-dir/file"),
        Member("to-dir"),
        folder("to-file"),
        Member("to-file/x"),
        symlink("soft", "a"),
        Member("mode", mode=0o644),
        Member("caps", b"same", mtime=5),
    ]
    unpack(layer(members), before)
    shutil.copytree(before, after, symlinks=True)
    (after / "deep/er/changed").write_text("abd")  # as long as before
    os.utime(after / "deep/er/changed", (1_500_000_000, 1_500_000_000))
    (after / "gone").unlink()
    shutil.rmtree(after / "gone-dir")
    (after / "to-dir").unlink()
    (after / "to-dir").mkdir()
    (after / "to-dir/new").touch()
    shutil.rmtree(after / "to-file")
    (after / "to-file").touch()
    (after / "soft").unlink()
    (after / "soft").symlink_to("b")
    (after / "mode").chmod(0o600)
    os.setxattr(after / "caps", "user.x", b"1")
    os.utime(after / "caps", (5, 5))
    data = pack(bind(before), bind(after), tmp_path)
    assert sorted(entry.name for entry in read(data)) == [
        ".wh.gone",
        ".wh.gone-dir",
        "caps",
        "deep/",
        "deep/er/",
        "deep/er/changed",
        "mode",
        "soft",
        "to-dir/",
        "to-dir/new",
        "to-file",
    ]
    unpack(data, before)
    assert looks(before, times=False) == looks(after, times=False)


def test_what_a_layer_cannot_have_is_left_out(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "socket"))
    (tree / "file").touch()
    os.setxattr(tree / "file", "trusted.overlay.origin", b"x")
    os.setxattr(tree / "file", "trusted.other", b"x")
    (entry,) = read(pack([], bind(tree), tmp_path))
    assert (entry.name, entry.xattrs) == ("file", {"trusted.other": b"x"})


def test_times_are_whole_seconds_and_not_too_new(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name, time_ns in (("old", 1_999_999_999), ("new", 5_000_000_000)):
        (tree / name).touch()
        os.utime(tree / name, ns=(time_ns, time_ns))
    entries = read(pack([], bind(tree), tmp_path, newest_ns=3_000_000_000))
    assert {entry.name: entry.mtime_ns for entry in entries} == {
        "old": 1_000_000_000,
        "new": 3_000_000_000,
    }
    assert {entry.kind for entry in entries} == {reader.REGULAR}


def test_mounts_that_show_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="nowhere"):
        pack([], bind(tmp_path / "nowhere"), tmp_path)


NAMES = st.sampled_from(["a", "b", "c", "x y"])
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "mkdir", "symlink", "remove", "chmod"]),
        st.lists(NAMES, min_size=1, max_size=3),
        st.integers(0, 7),
    ),
    max_size=12,
)


def act(root: Path, actions: list[tuple[str, list[str], int]]) -> None:
    for action, names, number in actions:
        path = root.joinpath(*names)
        try:
            if action == "remove" and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif action == "remove":
                path.unlink()
            elif action == "mkdir":
                path.mkdir()
            elif action == "symlink":
                path.symlink_to(str(number))
            elif action == "chmod" and not path.is_symlink():
                path.chmod(0o700 | number)
            elif action == "write" and not path.is_symlink():
                path.write_text(str(number))
        except OSError:
            continue  # there is no such place now


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ACTIONS, ACTIONS)
def test_the_layer_makes_the_one_tree_of_the_other(
    tmp_path: Path, first: list[tuple[str, list[str], int]], then: list[tuple[str, list[str], int]]
) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
        before, after = Path(directory) / "before", Path(directory) / "after"
        before.mkdir()
        act(before, first)
        shutil.copytree(before, after, symlinks=True)
        act(after, then)
        data = pack(bind(before), bind(after), Path(directory))
        unpack(data, before)
        assert looks(before, times=False) == looks(after, times=False)
