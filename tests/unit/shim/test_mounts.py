from __future__ import annotations

import os

import pytest

from services.common import linux
from services.common.errors import FailedPrecondition, InvalidArgument
from services.shim import mounts
from services.shim.mounts import Mount, parse_options, shorten_lower_directories


def test_options_become_flags_propagation_and_data():
    parsed = parse_options(["ro", "nosuid", "suid", "rbind", "rslave", "size=1m", "", "defaults"])
    assert parsed.flags == linux.MS_RDONLY | linux.MS_BIND | linux.MS_REC
    assert parsed.propagation == linux.MS_SLAVE | linux.MS_REC
    assert parsed.data == ("size=1m",)


def test_lower_directories_are_named_from_their_common_parent():
    directory, data = shorten_lower_directories(
        ["lowerdir=/var/lib/s/1/fs:/var/lib/s/22/fs", "upperdir=/var/lib/s/3/fs"]
    )
    assert directory == "/var/lib/s"
    assert data == ("lowerdir=1/fs:22/fs", "upperdir=/var/lib/s/3/fs")


@pytest.mark.parametrize(
    "data", [("upperdir=/x",), ("lowerdir=relative:/x",), ("lowerdir=/a/b:/c/d",)]
)
def test_directories_without_a_common_parent_stay(data):
    assert shorten_lower_directories(data) == ("", data)


def test_options_longer_than_a_page_are_refused_not_cut(tmp_path):
    mount = Mount("tmpfs", "tmpfs", options=("x" * 5000,))
    with pytest.raises(FailedPrecondition, match="the kernel takes 4095"):
        mounts.mount_all([mount], tmp_path)


def test_target_stays_below_the_root(tmp_path):
    with pytest.raises(InvalidArgument, match="outside"):
        mounts.mount_all([Mount("tmpfs", "tmpfs", target="../../etc")], tmp_path)


def test_kernels_refusal_is_told_and_nothing_stays(tmp_path):
    with pytest.raises(FailedPrecondition, match="no-such-fs"):
        mounts.mount_all([Mount("no-such-fs", "none")], tmp_path)
    mounts.unmount(tmp_path)
    mounts.unmount(tmp_path / "missing")


@pytest.mark.root
def test_mounts_are_stacked_and_undone(tmp_path):
    source = tmp_path / "source"
    root = tmp_path / "root"
    for path in (source, root):
        path.mkdir()
    (source / "file").write_text("x")
    mounts.mount_all(
        [
            Mount("bind", str(source), options=("rbind", "ro")),
            Mount("tmpfs", "tmpfs", options=("size=64k",)),
            Mount("tmpfs", "tmpfs", target="/below"),
        ],
        root,
    )
    try:
        assert os.path.ismount(root / "below")
    finally:
        mounts.unmount(root / "below")
        mounts.unmount(root)
    assert not os.path.ismount(root)
    with pytest.raises(FailedPrecondition):
        mounts.mount_all([Mount("bind", str(source)), Mount("none", "x")], root)
    assert not os.path.ismount(root)


@pytest.mark.root
def test_bind_mount_takes_its_flags(tmp_path):
    mounts.mount_all([Mount("bind", str(tmp_path), options=("ro",))], tmp_path)
    try:
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "file").write_text("x")
    finally:
        mounts.unmount(tmp_path)
