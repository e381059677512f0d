from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from services.daemon.spec.layers import LayeredRoot, layers_of_mount
from services.daemon.spec.request import ResolvedUser
from services.daemon.spec.users import resolve_user

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# a comment
broken line
www:x:33:34:web:/var/www:/bin/false
twin:x:33:99::/twin:
bare:x:50:51
1000:x:77:78::/confusing:
"""
GROUP = """\
root:x:0:
www:x:34:
ssl:x:100:www,other
logs:x:101:other,www
mine:x:34:www
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text(PASSWD)
    (tmp_path / "root/etc/group").write_text(GROUP)
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", ResolvedUser(0, 0, (), "/root")),
        ("root", ResolvedUser(0, 0, (), "/root")),
        ("www", ResolvedUser(33, 34, (100, 101), "/var/www")),
        ("33", ResolvedUser(33, 34, (100, 101), "/var/www")),
        ("www:ssl", ResolvedUser(33, 100, (), "/var/www")),
        ("www:7", ResolvedUser(33, 7, (), "/var/www")),
        ("1234", ResolvedUser(1234, 0, (), "/")),
        ("1234:logs", ResolvedUser(1234, 101, (), "/")),
        ("1000", ResolvedUser(1000, 0, (), "/")),
        (":ssl", ResolvedUser(0, 100, (), "/root")),
        ("bare", ResolvedUser(50, 51, (), "/")),
    ],
)
def test_users_are_found_as_moby_finds_them(root: Path, user: str, expected: ResolvedUser) -> None:
    assert resolve_user([root], user) == expected


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("nobody", "unable to find user nobody: no matching entries in passwd file"),
        ("www:nogroup", "unable to find group nogroup: no matching entries in group file"),
        ("2147483648", "uids and gids must be in range 0-2147483647"),
        ("-1", "uids and gids must be in range 0-2147483647"),
    ],
)
def test_unknown_users_are_refused_in_words(root: Path, user: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        resolve_user([root], user)
    assert refused.value.message == message


def test_numbers_need_no_files(tmp_path: Path) -> None:
    assert resolve_user([tmp_path], "5:6") == ResolvedUser(5, 6, (), "/")
    assert resolve_user([tmp_path], "") == ResolvedUser(0, 0, (), "/")
    assert resolve_user([], "5") == ResolvedUser(5, 0, (), "/")


def layer(tmp_path: Path, name: str, **files: str) -> Path:
    (tmp_path / name).mkdir()
    for path, text in files.items():
        target = tmp_path / name / path.replace("_", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return tmp_path / name


def read(path: str, *layers: Path) -> bytes | None:
    return LayeredRoot(layers).read(path, size_max=100)


def test_the_topmost_layer_that_has_the_file_counts(tmp_path: Path) -> None:
    low = layer(tmp_path, "low", etc_passwd="low", etc_group="group")
    high = layer(tmp_path, "high", etc_passwd="high")
    top = layer(tmp_path, "top", var_x="")
    assert read("/etc/passwd", top, high, low) == b"high"
    assert read("/etc/group", top, high, low) == b"group"
    assert read("/etc/shadow", top, high, low) is None


def test_a_file_above_hides_the_directory_below(tmp_path: Path) -> None:
    low = layer(tmp_path, "low", etc_passwd="low")
    high = layer(tmp_path, "high", etc="no directory")
    assert read("/etc/passwd", high, low) is None


def test_symlinks_are_walked_inside_the_merged_root(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    low = layer(tmp_path, "low", usr_etc_passwd="inside", secret_x="")
    high = layer(tmp_path, "high")
    (high / "etc").symlink_to("/usr/etc")
    (high / "up").symlink_to("../../../../../../usr/etc/passwd")
    (high / "host").symlink_to(secret)
    (high / "loop").symlink_to("loop")
    (high / "usr").mkdir()
    (high / "usr/again").symlink_to("../etc/passwd")
    assert read("/etc/passwd", high, low) == b"inside"
    assert read("/up", high, low) == b"inside"
    assert read("/usr/again", high, low) == b"inside"
    assert read("/host", high, low) is None
    assert read("/loop", high, low) is None


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    low = layer(tmp_path, "low", etc_passwd="low")
    os.mkfifo(low / "fifo")
    assert read("/fifo", low) is None
    assert read("/etc", low) is None
    assert read("/etc/passwd/x", low) is None


def test_a_file_has_a_bound(tmp_path: Path) -> None:
    low = layer(tmp_path, "low", big="x" * 101, fits="x" * 100)
    assert read("fits", low) == b"x" * 100
    with pytest.raises(ResourceExhausted):
        read("big", low)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts are device nodes")
def test_whiteouts_and_opaque_directories_hide_what_is_below(tmp_path: Path) -> None:
    low = layer(tmp_path, "low", etc_passwd="low", etc_group="low")
    gone = layer(tmp_path, "gone", etc_x="")
    os.mknod(gone / "etc/passwd", 0o20000, os.makedev(0, 0))
    assert read("/etc/passwd", gone, low) is None
    assert read("/etc/group", gone, low) == b"low"
    opaque = layer(tmp_path, "opaque", etc_passwd="new")
    os.setxattr(opaque / "etc", "trusted.overlay.opaque", b"y")
    assert read("/etc/passwd", opaque, low) == b"new"
    assert read("/etc/group", opaque, low) is None


def test_layers_come_out_of_containerds_mounts() -> None:
    options = ["index=off", "workdir=/w", "upperdir=/u", r"lowerdir=/a:/b\:c:/d"]
    assert layers_of_mount(fstype="overlay", source="overlay", options=options) == (
        Path("/u"),
        Path("/a"),
        Path("/b:c"),
        Path("/d"),
    )
    assert layers_of_mount(fstype="bind", source="/r", options=["rbind", "ro"]) == (Path("/r"),)
    with pytest.raises(FailedPrecondition, match="erofs"):
        layers_of_mount(fstype="erofs", source="/x", options=[])
