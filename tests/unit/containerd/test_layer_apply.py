"""Layers unpacked: exactly as GNU tar does it, with whiteouts, and never outside."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import DataLoss, InvalidArgument, ResourceExhausted, TheseusError
from services.containerd.diff.applier import LowerNeeded
from services.containerd.diff.flusher import Flusher
from services.containerd.diff.rooted import clean
from tests.fakes.layers import Member, folder, hardlink, layer, looks, symlink, unpack

pytestmark = pytest.mark.root

OPAQUE = "trusted.overlay.opaque"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir(mode=0o755)
    return root


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside the root that nothing may touch; checked afterwards by ``intact``."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    return outside


def intact(outside: Path) -> bool:
    return [path.name for path in outside.iterdir()] == ["secret"] and (
        (outside / "secret").read_text() == "secret"
        and (outside / "secret").stat().st_nlink == 1
        and (outside / "secret").stat().st_mode & 0o7777 == 0o644
    )


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


class TestEntries:
    def test_everything_arrives_as_it_is_described(self, root: Path) -> None:
        capability = (
            "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
        )
        unpack(
            layer(
                [
                    folder("bin", 0o2775, uid=5, gid=6, mtime=1000),
                    Member("bin/su", b"#!", mode=0o6755, uid=0, gid=7, mtime=2000),
                    Member(
                        "bin/ping",
                        b"ping",
                        mode=0o755,
                        pax={"SCHILY.xattr.security.capability": capability},
                    ),
                    Member("bin/late", pax={"mtime": "1500000000.123456789"}),
                    symlink("sh", "/bin/su"),
                    hardlink("bin/su2", "/bin/su"),
                    Member("null", type=tarfile.CHRTYPE, device=(1, 3), mode=0o666, gid=9),
                    Member("disk", type=tarfile.BLKTYPE, device=(259, 70000), mode=0o4660),
                    Member("pipe", type=tarfile.FIFOTYPE, mode=0o600, uid=3),
                    folder("tmp", 0o1777),
                ]
            ),
            root,
        )
        directory = (root / "bin").stat()
        assert (directory.st_mode & 0o7777, directory.st_uid, directory.st_gid) == (0o2775, 5, 6)
        assert directory.st_mtime == 1000
        su = (root / "bin/su").stat()
        assert (su.st_mode & 0o7777, su.st_gid, su.st_mtime, su.st_nlink) == (0o6755, 7, 2000, 2)
        assert (root / "bin/ping").stat().st_gid == 0  # not that of the set-group-ID directory
        assert os.getxattr(root / "bin/ping", "security.capability").startswith(b"\x01\0\0\x02")
        assert (root / "bin/late").stat().st_mtime_ns == 1_500_000_000_123_456_789
        assert (root / "sh").readlink() == Path("/bin/su")
        assert (root / "sh").lstat().st_mtime == 1_500_000_000
        null = (root / "null").stat()
        assert (null.st_rdev, null.st_mode & 0o7777, null.st_gid) == (os.makedev(1, 3), 0o666, 9)
        disk = (root / "disk").stat()
        assert (disk.st_rdev, disk.st_mode & 0o7777) == (os.makedev(259, 70000), 0o4660)
        assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
        assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777

    def test_later_entries_replace_earlier_ones(self, root: Path) -> None:
        unpack(
            layer(
                [
                    Member("a", b"file"),
                    folder("a"),
                    Member("a/x"),
                    Member("b", b"old"),
                    Member("b", b"new", mode=0o600),
                    folder("c"),
                    Member("c/kept"),
                    folder("c", 0o700),
                    folder("d"),
                    Member("d/gone"),
                    symlink("d", "c"),
                    symlink("e", "b"),
                    Member("e", b"file now"),
                ]
            ),
            root,
        )
        assert (root / "a/x").is_file()
        assert ((root / "b").read_text(), (root / "b").stat().st_mode & 0o777) == ("new", 0o600)
        assert (root / "c/kept").exists()
        assert (root / "c").stat().st_mode & 0o777 == 0o700
        assert (root / "d").is_symlink()
        assert (root / "e").read_text() == "file now"
        assert not (root / "e").is_symlink()

    def test_missing_parents_are_made(self, root: Path) -> None:
        unpack(layer([Member("a/b/c/file", uid=5)]), root)
        for name in ("a", "a/b", "a/b/c"):
            status = (root / name).stat()
            assert (status.st_mode & 0o7777, status.st_uid) == (0o755, 0)

    def test_missing_parents_look_like_those_below(self, tmp_path: Path, root: Path) -> None:
        top, bottom = tmp_path / "top", tmp_path / "bottom"
        for path, mode in ((top / "a", 0o750), (bottom / "a/b", 0o1777), (bottom / "c", 0o700)):
            path.mkdir(parents=True)
            path.chmod(mode)
        os.chown(top / "a", 11, 12)
        os.setxattr(bottom / "a/b", "user.x", b"y")
        os.utime(bottom / "a/b", ns=(1, 2))
        (top / "c").write_text("no directory any more")
        unpack(
            layer([Member("a/b/file"), Member("c/file")]), root, overlay=True, lower=[top, bottom]
        )
        status = (root / "a").stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o750, 11, 12)
        assert (root / "a/b").stat().st_mode & 0o7777 == 0o1777
        assert (root / "a/b").stat().st_mtime_ns == 2
        assert os.getxattr(root / "a/b", "user.x") == b"y"
        assert (root / "c").stat().st_mode & 0o7777 == 0o755

    def test_a_directorys_default_acl_does_not_change_what_the_layer_says(self, root: Path) -> None:
        # version 2; user::rwx, group::rwx, other::--- : linux/posix_acl_xattr.h
        acl = b"\x02\0\0\0" + b"".join(
            tag.to_bytes(2, "little") + permission.to_bytes(2, "little") + b"\xff" * 4
            for tag, permission in ((1, 7), (4, 7), (0x20, 0))
        )
        root_directory = root / "d"
        root_directory.mkdir()
        try:
            os.setxattr(root_directory, "system.posix_acl_default", acl)
        except OSError:
            pytest.skip("no ACLs on this file system")
        unpack(layer([Member("d/file", mode=0o644), folder("d/e", 0o755)]), root)
        assert (root / "d/file").stat().st_mode & 0o7777 == 0o644
        assert (root / "d/e").stat().st_mode & 0o7777 == 0o755

    def test_attributes_that_a_file_cannot_have_are_left_out(self, root: Path) -> None:
        attribute = {"SCHILY.xattr.user.x": "1"}
        unpack(
            layer(
                [
                    Member("pipe", type=tarfile.FIFOTYPE, pax=attribute),
                    Member("link", type=tarfile.SYMTYPE, link="x", pax=attribute),
                    Member("file", pax=attribute),
                ]
            ),
            root,
        )
        assert os.listxattr(root / "pipe") == []
        assert os.getxattr(root / "file", "user.x") == b"1"

    def test_attributes_that_steer_overlayfs_are_left_out(self, root: Path) -> None:
        pax = {
            "SCHILY.xattr.trusted.overlay.redirect": "/etc",
            "SCHILY.xattr.user.overlay.opaque": "y",
            "SCHILY.xattr.trusted.kept": "1",
        }
        unpack(layer([folder("d", pax=pax)]), root, overlay=True)
        assert os.listxattr(root / "d") == ["trusted.kept"]

    def test_times_that_cannot_be_are_the_epoch(self, root: Path) -> None:
        unpack(
            layer([Member("past", mtime=-5), Member("future", mtime=2**61)], tarfile.GNU_FORMAT),
            root,
        )
        assert (root / "past").stat().st_mtime_ns == 0
        assert (root / "future").stat().st_mtime_ns == 0

    def test_an_owner_that_cannot_be_is_refused(self, root: Path) -> None:
        for member in (Member("file", uid=2**32 - 1), Member("file", gid=2**40)):
            with pytest.raises(InvalidArgument, match="owner"):
                unpack(layer([member]), root)

    def test_a_hard_link_to_a_symbolic_link_is_not_followed(self, root: Path) -> None:
        unpack(layer([symlink("soft", "nowhere"), hardlink("hard", "soft")]), root)
        assert (root / "hard").readlink() == Path("nowhere")

    def test_a_hard_link_to_itself_changes_nothing(self, root: Path) -> None:
        unpack(layer([Member("a", b"x"), hardlink("b", "a"), hardlink("a", "b")]), root)
        assert (root / "a").read_bytes() == b"x"
        assert (root / "a").stat().st_nlink == 2

    @pytest.mark.parametrize("target", ["nowhere", "nowhere/file", "file/x", "", "dir"])
    def test_a_hard_link_to_nothing_is_refused(self, root: Path, target: str) -> None:
        with pytest.raises(InvalidArgument, match="hard link 'link'"):
            unpack(layer([Member("file"), folder("dir"), hardlink("link", target)]), root)

    def test_a_file_as_a_directory_is_refused(self, root: Path) -> None:
        with pytest.raises(InvalidArgument, match=r"'a/b'.*[Nn]ot a directory"):
            unpack(layer([Member("a"), Member("a/b")]), root)

    def test_a_name_too_long_for_the_file_system_is_refused(self, root: Path) -> None:
        with pytest.raises(InvalidArgument, match="too long"):
            unpack(layer([Member("n" * 300)]), root)

    def test_the_root_itself_is_left_as_it_is(self, root: Path) -> None:
        unpack(layer([folder("./", 0o700, uid=5), folder("/", 0o700), folder("..", 0o700)]), root)
        assert (root.stat().st_mode & 0o7777, root.stat().st_uid) == (0o755, 0)

    def test_many_directories_need_few_descriptors(self, root: Path) -> None:
        members = [folder(f"d{number}") for number in range(3000)]
        members += [Member(f"d{number}/file") for number in range(3000)]
        before = len(list(Path("/proc/self/fd").iterdir()))
        unpack(layer(members), root)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert len(list(root.glob("d*/file"))) == 3000


class TestNames:
    @pytest.mark.parametrize(
        ("name", "cleaned"),
        [
            ("a/b", "a/b"),
            ("./a/b/", "a/b"),
            ("/a", "a"),
            ("//a//b", "a/b"),
            ("a/./b", "a/b"),
            ("a/../b", "b"),
            ("../../b", "b"),
            ("a/..", ""),
            (".", ""),
            ("./", ""),
            ("/", ""),
            ("..", ""),
            ("...", "..."),
            ("a./b", "a./b"),
            ("..a/b..", "..a/b.."),
        ],
    )
    def test_are_cleaned(self, name: str, cleaned: str) -> None:
        assert clean(name) == cleaned


class TestWhiteouts:
    def test_in_a_plain_tree_they_remove(self, root: Path) -> None:
        for name in ("keep", "gone", "dir/gone", "dir/keep"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).touch()
        (root / "tree/sub").mkdir(parents=True)
        unpack(
            layer(
                [
                    Member(".wh.gone"),
                    Member("dir/.wh.gone"),
                    Member(".wh.tree"),
                    Member(".wh.never"),
                    Member("no/.wh.where"),
                ]
            ),
            root,
        )
        assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
            "dir",
            "dir/keep",
            "keep",
        ]

    def test_in_an_overlay_they_are_devices(self, root: Path) -> None:
        unpack(layer([Member(".wh.gone", uid=7), Member("a/.wh.b")]), root, overlay=True)
        assert is_whiteout(root / "gone")
        assert is_whiteout(root / "a/b")

    def test_opaque_directories_lose_what_was_there(self, root: Path) -> None:
        for name in ("dir/old", "dir/sub/old", "dir/new"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("old")
        unpack(
            layer(
                [
                    folder("dir"),
                    Member("dir/new", b"new"),
                    folder("dir/sub"),
                    Member("dir/sub/new"),
                    Member("dir/.wh..wh..opq"),
                ]
            ),
            root,
        )
        assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
            "dir",
            "dir/new",
            "dir/sub",
            "dir/sub/new",
        ]

    def test_opaque_directories_of_an_overlay_have_an_attribute(self, root: Path) -> None:
        unpack(layer([Member("a/.wh..wh..opq"), Member("a/file")]), root, overlay=True)
        assert os.getxattr(root / "a", OPAQUE) == b"y"
        assert (root / "a/file").exists()

    @pytest.mark.parametrize("overlay", [True, False])
    def test_they_spare_what_their_own_layer_brings(self, root: Path, overlay: bool) -> None:
        unpack(
            layer(
                [
                    Member("file", b"new"),
                    Member(".wh.file"),
                    folder("dir"),
                    Member("dir/x"),
                    Member(".wh.dir"),
                ]
            ),
            root,
            overlay=overlay,
        )
        assert (root / "file").read_bytes() == b"new"
        assert (root / "dir/x").exists()
        if overlay:
            assert os.getxattr(root / "dir", OPAQUE) == b"y"

    def test_a_directory_in_the_place_of_a_whiteout_is_opaque(self, root: Path) -> None:
        unpack(
            layer([Member(".wh.a"), folder("a"), Member(".wh.b"), Member("b/file")]),
            root,
            overlay=True,
        )
        assert os.getxattr(root / "a", OPAQUE) == b"y"
        assert (root / "b/file").exists()
        assert os.getxattr(root / "b", OPAQUE) == b"y"

    def test_a_file_can_take_the_place_of_a_whiteout(self, root: Path) -> None:
        unpack(layer([Member(".wh.a"), Member("a", b"new")]), root, overlay=True)
        assert (root / "a").read_bytes() == b"new"

    def test_what_was_in_the_upper_directory_before_gives_way(self, root: Path) -> None:
        (root / "dir/sub").mkdir(parents=True)
        unpack(layer([Member(".wh.dir")]), root, overlay=True)
        assert is_whiteout(root / "dir")

    @pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "a/.wh.."])
    def test_those_that_climb_are_refused(self, root: Path, name: str) -> None:
        with pytest.raises(InvalidArgument, match="hides nothing"):
            unpack(layer([Member(name)]), root)
        assert root.exists()

    def test_notes_of_aufs_are_passed_over(self, root: Path) -> None:
        unpack(layer([folder(".wh..wh.plnk"), Member(".wh..wh.aufs")]), root, overlay=True)
        assert list(root.iterdir()) == []


class TestClimbing:
    """What an attacker tries. ``outside`` lies beside the root."""

    @pytest.mark.parametrize(
        "name", ["../outside/new", "/../outside/new", "a/../../outside/new", "./../outside/new"]
    )
    def test_dots_stop_at_the_root(self, root: Path, outside: Path, name: str) -> None:
        unpack(layer([Member(name, b"x")]), root)
        assert intact(outside)
        assert (root / "outside/new").read_bytes() == b"x"

    def test_an_absolute_name_is_below_the_root(self, root: Path, outside: Path) -> None:
        unpack(layer([Member(f"{outside}/secret", b"x")]), root)
        assert intact(outside)
        assert (root / str(outside).lstrip("/") / "secret").read_bytes() == b"x"

    @pytest.mark.parametrize("target", ["{outside}", "../outside", "../../../../../../{outside}"])
    def test_a_write_through_a_link_stays_inside(
        self, root: Path, outside: Path, target: str
    ) -> None:
        target = target.format(outside=outside)
        for member in (
            Member("link/new", b"x"),
            Member("link/secret", b"x"),
            folder("link/sub"),
            symlink("link/soft", "x"),
            Member("link/.wh.secret"),
            Member("link/.wh..wh..opq"),
            Member("link/deep/er/file"),
        ):
            for overlay in (True, False):
                with contextlib.suppress(TheseusError):
                    unpack(layer([symlink("link", target), member]), root, overlay=overlay)
                assert intact(outside), member

    def test_a_link_that_leads_inside_is_followed_inside(self, root: Path) -> None:
        unpack(
            layer([folder("real"), symlink("link", "/real"), Member("link/file", b"x")]),
            root,
        )
        assert (root / "real/file").read_bytes() == b"x"

    def test_a_link_that_leads_to_nothing_yet_is_followed_inside(
        self, root: Path, outside: Path
    ) -> None:
        unpack(
            layer([symlink("a", "/b/c"), Member("a/file", b"x"), symlink("l", f"{outside}/new")]),
            root,
        )
        unpack(layer([Member("l/file")]), root)
        assert (root / "b/c/file").read_bytes() == b"x"
        assert intact(outside)
        assert (root / str(outside).lstrip("/") / "new/file").exists()

    def test_a_file_does_not_write_through_a_link_of_its_name(
        self, root: Path, outside: Path
    ) -> None:
        unpack(layer([symlink("f", f"{outside}/secret"), Member("f", b"x", mode=0o777)]), root)
        assert intact(outside)
        assert (root / "f").read_bytes() == b"x"
        assert not (root / "f").is_symlink()

    def test_a_directory_does_not_adopt_a_link_of_its_name(self, root: Path, outside: Path) -> None:
        mode = outside.stat().st_mode
        unpack(layer([symlink("d", str(outside)), folder("d", 0o777), Member("d/new")]), root)
        assert intact(outside)
        assert outside.stat().st_mode == mode
        assert (root / "d/new").is_file()

    def test_a_device_or_a_pipe_does_not_change_what_a_link_leads_to(
        self, root: Path, outside: Path
    ) -> None:
        unpack(
            layer(
                [
                    symlink("p", f"{outside}/secret"),
                    Member("p", type=tarfile.FIFOTYPE, mode=0o4777, uid=5),
                ]
            ),
            root,
        )
        assert intact(outside)

    @pytest.mark.parametrize("target", ["../outside/secret", "{outside}/secret", "link/secret"])
    def test_a_hard_link_cannot_reach_outside(self, root: Path, outside: Path, target: str) -> None:
        members = [symlink("link", str(outside)), hardlink("h", target.format(outside=outside))]
        with pytest.raises(InvalidArgument, match="hard link"):
            unpack(layer(members), root)
        assert intact(outside)

    def test_attributes_of_a_hard_links_target_stay(self, root: Path, outside: Path) -> None:
        member = Member("h", type=tarfile.LNKTYPE, link="soft", mode=0o777, uid=5)
        unpack(layer([symlink("soft", f"{outside}/secret"), member]), root)
        assert intact(outside)

    def test_removing_a_tree_does_not_follow_links_in_it(self, root: Path, outside: Path) -> None:
        members = [folder("d"), symlink("d/link", str(outside)), Member("d", b"file now")]
        unpack(layer(members), root)
        assert intact(outside)
        assert (root / "d").read_bytes() == b"file now"

    def test_a_directory_that_becomes_a_link_is_not_remembered(
        self, root: Path, outside: Path
    ) -> None:
        members = [
            folder("d"),
            Member("d/first"),
            symlink("d", str(outside)),
            Member("d/second"),
        ]
        unpack(layer(members), root)
        assert intact(outside)
        assert (root / str(outside).lstrip("/") / "second").exists()

    def test_a_lower_layers_link_does_not_lead_outside(
        self, tmp_path: Path, root: Path, outside: Path
    ) -> None:
        lower = tmp_path / "lower"
        lower.mkdir()
        (lower / "d").symlink_to(outside)
        unpack(layer([Member("d/secret", b"x")]), root, overlay=True, lower=[lower])
        assert intact(outside)
        assert (root / "d/secret").read_bytes() == b"x"

    def test_loops_of_links_are_refused(self, root: Path) -> None:
        with pytest.raises(InvalidArgument, match="'a/file'"):
            unpack(layer([symlink("a", "b"), symlink("b", "a"), Member("a/file")]), root)

    def test_proc_is_not_a_way_out(self, root: Path, outside: Path) -> None:
        fd = os.open(outside, os.O_RDONLY)
        try:
            unpack(layer([symlink("l", f"/proc/self/fd/{fd}"), Member("l/new")]), root)
        finally:
            os.close(fd)
        assert intact(outside)


NAMES = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=20
).filter(lambda name: name not in (".", "..") and not name.startswith(".wh."))
LONG = st.builds(lambda name, n: name * n, st.sampled_from(["x", "y z", "-"]), st.integers(30, 60))


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[Member], int]:
    """A tar's members in an order that is possible, and a format."""
    paths: dict[str, Member] = {}
    directories = [""]
    files: list[str] = []
    for _ in range(draw(st.integers(0, 12))):
        above = draw(st.sampled_from(directories))
        name = (f"{above}/" if above else "") + draw(NAMES | LONG)
        if len(name) > 200 or name in paths:
            continue
        common: dict[str, Any] = {
            "mode": draw(st.integers(0, 0o7777)),
            "uid": draw(st.sampled_from([0, 1, 1000, 70000, 2**31])),
            "gid": draw(st.sampled_from([0, 5, 2**22])),
            "mtime": draw(st.integers(0, 2**33)),
        }
        kind = draw(st.sampled_from(["dir", "file", "soft", "hard", "fifo", "dev"]))
        if kind == "dir":
            directories.append(name)
            paths[name] = Member(name, type=tarfile.DIRTYPE, **common)
        elif kind == "soft":
            target = draw(NAMES | LONG | st.just("/../../etc/passwd"))
            paths[name] = Member(name, type=tarfile.SYMTYPE, link=target, **common)
        elif kind == "fifo":
            paths[name] = Member(name, type=tarfile.FIFOTYPE, **common)
        elif kind == "dev":
            device = draw(st.tuples(st.integers(1, 255), st.integers(0, 1000)))
            paths[name] = Member(name, type=tarfile.CHRTYPE, device=device, **common)
        elif kind == "hard" and files:
            paths[name] = hardlink(name, draw(st.sampled_from(files)))
        else:
            files.append(name)
            data = draw(st.binary(max_size=1200))
            attributes = draw(
                st.dictionaries(st.sampled_from(["user.a", "user.b c"]), st.text("ab=", max_size=9))
            )
            pax = {f"SCHILY.xattr.{key}": value for key, value in attributes.items() if value}
            paths[name] = Member(name, data, pax=pax, **common)
    tar_format = tarfile.PAX_FORMAT
    if not any(member.pax for member in paths.values()):
        tar_format = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    return list(paths.values()), tar_format


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(trees(), st.booleans())
def test_the_result_is_that_of_gnu_tar(
    tmp_path: Path, tree: tuple[list[Member], int], overlay: bool
) -> None:
    data = layer(*tree)
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
        ours, theirs = Path(directory) / "ours", Path(directory) / "theirs"
        ours.mkdir()
        theirs.mkdir()
        unpack(data, ours, overlay=overlay)
        subprocess.run(
            [
                *("tar", "--extract", "--same-permissions", "--same-owner", "--numeric-owner"),
                *("--xattrs", "--xattrs-include=*", "--delay-directory-restore"),
                *("--absolute-names", "--directory", theirs),
            ],
            input=data,
            check=True,
            capture_output=True,
        )
        assert looks(ours) == looks(theirs)


class TestDetached:
    """An overlay's upper directory filled before the lower ones are there."""

    LOWER = (folder("etc", 0o700, uid=7), Member("etc/passwd", b"x"), Member("top", b"t"))
    UPPER = (
        folder("etc", 0o750, uid=8),
        Member("etc/group", b"g", mtime=1000),
        hardlink("etc/again", "etc/group"),
        Member("etc/.wh.passwd"),
        folder("new"),
        symlink("new/link", "../etc"),
        Member(".wh.top"),
    )

    def test_the_result_is_that_over_the_lower_layers(self, tmp_path: Path) -> None:
        trees = [tmp_path / name for name in ("lower", "over", "detached")]
        for tree in trees:
            tree.mkdir(mode=0o755)
        lower, over, detached = trees
        unpack(layer(self.LOWER), lower)
        first = unpack(layer(self.UPPER), over, overlay=True, lower=[lower])
        second = unpack(layer(self.UPPER), detached, overlay=True, detached=True)
        assert first == second
        assert looks(over, times=False) == looks(detached, times=False)
        assert is_whiteout(detached / "etc/passwd")

    @pytest.mark.parametrize(
        "member",
        [Member("etc/group", b"g"), Member("etc/.wh.passwd"), hardlink("again", "top")],
        ids=lambda member: str(member.name),
    )
    def test_what_needs_a_lower_layer_is_refused(self, member: Member, root: Path) -> None:
        with pytest.raises(LowerNeeded, match="not in the layer"):
            unpack(layer([member]), root, overlay=True, detached=True)

    @given(st.lists(st.sampled_from((*LOWER, *UPPER)), max_size=8))
    @settings(max_examples=60, deadline=None)
    def test_any_layer_gives_the_same_or_is_refused(self, members: list[Member]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            trees = [Path(directory) / name for name in ("lower", "over", "detached")]
            for tree in trees:
                tree.mkdir(mode=0o755)
            lower, over, detached = trees
            unpack(layer(self.LOWER), lower)
            try:
                unpack(layer(members), detached, overlay=True, detached=True)
            except TheseusError:
                return
            unpack(layer(members), over, overlay=True, lower=[lower])
            assert looks(over, times=False) == looks(detached, times=False)


class TestFlusher:
    """Writing to the disk begins early, and its failures are not lost."""

    def test_it_syncs_after_every_step_one_at_a_time(self) -> None:
        gate, calls = threading.Event(), []

        def sync(fd: int) -> None:
            calls.append(fd)
            gate.wait(10)

        flusher = Flusher(7, sync)
        flusher.wrote(1 << 20)
        assert calls == []
        for _ in range(5):
            flusher.wrote(16 << 20)
        gate.set()
        assert flusher.finish() is None
        assert calls == [7]
        flusher.wrote(1)
        assert flusher.finish() is None
        assert calls == [7, 7]  # what was written while the first one was under way

    @pytest.mark.parametrize(
        ("number", "kind"), [(errno.EIO, DataLoss), (errno.ENOSPC, ResourceExhausted)]
    )
    def test_a_failed_write_fails_the_layer(
        self, root: Path, number: int, kind: type[TheseusError], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Flusher.__init__, "__defaults__", (fail,))
        with pytest.raises(kind, match="could not be written to the disk"):
            unpack(layer([Member("a", bytes(16 << 20))]), root)
