"""Mount options, mounts made read-only, and lists that are done and undone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.common import linux, overlay_mounts
from services.common.errors import FailedPrecondition, InvalidArgument, Unimplemented
from services.common.mounts import Mount, as_readonly, mount_all, parse_options, unmount
from services.common.overlay_mounts import MountFailed, overlay_option


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        ([], 0, ()),
        (["ro", "rbind"], linux.MS_RDONLY | linux.MS_BIND | linux.MS_REC, ()),
        (["ro", "rw"], 0, ()),
        (["nosuid", "suid", "nodev", ""], linux.MS_NODEV, ()),
        (["defaults", "noexec", "size=1m"], linux.MS_NOEXEC, ("size=1m",)),
        (
            ["lowerdir=/a:/b", "index=off", "volatile"],
            0,
            ("lowerdir=/a:/b", "index=off", "volatile"),
        ),
    ],
)
def test_options_are_flags_or_data(options: list[str], flags: int, data: tuple[str, ...]) -> None:
    parsed = parse_options(options)
    assert (parsed.flags, parsed.propagation, parsed.data) == (flags, 0, data)


@pytest.mark.parametrize(
    ("options", "propagation"),
    [
        (["rprivate"], linux.MS_PRIVATE | linux.MS_REC),
        (["rbind", "shared", "slave"], linux.MS_SLAVE),
        (["runbindable"], linux.MS_UNBINDABLE | linux.MS_REC),
    ],
)
def test_the_last_propagation_wins(options: list[str], propagation: int) -> None:
    assert parse_options(options).propagation == propagation


@pytest.mark.parametrize("option", ["loop", "X-containerd.mkdir"])
def test_options_that_somebody_else_has_to_see_to_are_refused(option: str) -> None:
    with pytest.raises(Unimplemented, match=option.partition("=")[0]):
        parse_options([option])


def test_the_value_of_an_option() -> None:
    options = ("workdir=/w", "lowerdir=/a:/b")
    assert overlay_option(options, "lowerdir") == "/a:/b"
    assert overlay_option(options, "upperdir") == ""


def test_a_read_only_bind_mount() -> None:
    assert as_readonly(Mount("bind", "/a", "sub", ("rw", "rbind"))) == Mount(
        "bind", "/a", "sub", ("rbind", "ro")
    )


def test_a_read_only_overlay_has_its_upper_directory_below() -> None:
    mount = Mount("overlay", "overlay", "", ("workdir=/w", "upperdir=/u", "lowerdir=/a:/b", "x=y"))
    assert as_readonly(mount).options == ("x=y", "lowerdir=/u:/a:/b", "ro")
    view = Mount("overlay", "overlay", "", ("lowerdir=/a:/b",))
    assert as_readonly(view).options == ("lowerdir=/a:/b", "ro")


def test_a_read_only_overlay_of_one_directory_is_a_bind_mount() -> None:
    mount = Mount("overlay", "overlay", "", ("upperdir=/u", "workdir=/w"))
    assert as_readonly(mount) == Mount("bind", "/u", "", ("ro", "rbind"))


def test_an_empty_list_is_no_mount(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        mount_all([], tmp_path)


def test_options_longer_than_a_page_are_refused_not_cut(tmp_path: Path) -> None:
    mount = Mount("tmpfs", "tmpfs", options=("x" * 5000,))
    with pytest.raises(FailedPrecondition, match="the kernel takes 4095"):
        mount_all([mount], tmp_path)


def test_the_kernels_refusal_is_told_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(MountFailed, match=r"no-such-fs .*: \w+"):
        mount_all([Mount("no-such-fs", "none")], tmp_path)
    unmount(tmp_path)
    unmount(tmp_path / "missing")


@pytest.mark.root
def test_mounts_are_stacked_and_undone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    root = tmp_path / "root"
    for path in (source, root):
        path.mkdir()
    (source / "file").write_text("x")
    mount_all(
        [
            Mount("bind", str(source), options=("rbind", "ro")),
            Mount("tmpfs", "tmpfs", options=("size=64k",)),
            Mount("tmpfs", "tmpfs", target="/made/below"),
        ],
        root,
    )
    try:
        assert os.path.ismount(root / "made/below")
    finally:
        unmount(root / "made/below")
        unmount(root)
    assert not os.path.ismount(root)
    with pytest.raises(MountFailed):
        mount_all([Mount("bind", str(source)), Mount("none", "x")], root)
    assert not os.path.ismount(root)


@pytest.mark.root
def test_a_target_is_made_inside_of_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    mount_all([Mount("tmpfs", "tmpfs", target="../../etc/x")], root)
    try:
        assert os.path.ismount(root / "etc/x")
    finally:
        unmount(root / "etc/x")


@pytest.mark.root
def test_a_bind_mount_takes_its_flags(tmp_path: Path) -> None:
    mount_all([Mount("bind", str(tmp_path), options=("ro",))], tmp_path)
    try:
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "file").write_text("x")
    finally:
        unmount(tmp_path)


MAPPED = ("uidmap=0:100000:65536", "gidmap=0:200000:65536")


@pytest.mark.root
def test_a_bind_mount_shows_mapped_owners(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    for directory in (source, root):
        directory.mkdir()
    (source / "file").touch()
    os.chown(source / "file", 3, 4)
    mount_all([Mount("bind", str(source), options=(*MAPPED, "ro", "rbind"))], root)
    try:
        found = (root / "file").stat()
        assert (found.st_uid, found.st_gid) == (100003, 200004)
        with pytest.raises(OSError, match="Read-only"):
            (root / "other").touch()
    finally:
        unmount(root)
    assert (source / "file").stat().st_uid == 3


@pytest.mark.root
@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_overlay_shows_its_lower_directories_with_mapped_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, one_by_one: bool
) -> None:
    monkeypatch.setattr(overlay_mounts, "_layers_one_by_one", lambda: one_by_one)
    directories = {name: tmp_path / "layers" / name for name in ("1", "2", "upper", "work")}
    for directory in directories.values():
        directory.mkdir(parents=True)
        (directory / f"of {directory.name}").touch()
    os.chown(directories["upper"] / "of upper", 100000, 200000)
    (tmp_path / "root").mkdir()
    lower = f"lowerdir={directories['2']}:{directories['1']}"
    upper = (f"upperdir={directories['upper']}", f"workdir={directories['work']}")
    mount = Mount("overlay", "overlay", options=(*MAPPED, *upper, lower, "index=off"))
    before = Path("/proc/self/mountinfo").read_text()
    mount_all([mount], tmp_path / "root")
    try:
        owners = {
            path.name: (path.stat().st_uid, path.stat().st_gid)
            for path in (tmp_path / "root").iterdir()
        }
        assert owners == dict.fromkeys(["of 1", "of 2", "of upper"], (100000, 200000))
        (tmp_path / "root/of 1").write_text("copied up")  # by the host's root, as its own
        found = (directories["upper"] / "of 1").stat()
        assert (found.st_uid, found.st_gid) == (100000, 200000)
    finally:
        unmount(tmp_path / "root")
    assert Path("/proc/self/mountinfo").read_text() == before
    assert (directories["1"] / "of 1").read_text() == ""


@pytest.mark.root
def test_an_overlay_that_fails_leaves_no_mapped_mount(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "a").mkdir()
    lower = f"lowerdir={tmp_path}/a:{tmp_path}/missing"
    before = Path("/proc/self/mountinfo").read_text()
    with pytest.raises(MountFailed):
        mount_all([Mount("overlay", "overlay", options=(*MAPPED, lower))], tmp_path / "root")
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.root
@pytest.mark.parametrize(
    ("mount", "error", "words"),
    [
        (Mount("tmpfs", "tmpfs", options=MAPPED), Unimplemented, "tmpfs"),
        (Mount("bind", "/", options=("bind", "uidmap=0:1:1")), InvalidArgument, "maps no ids"),
        (Mount("bind", "/", options=("bind", "uidmap=0:1:0", MAPPED[1])), InvalidArgument, "exist"),
    ],
)
def test_mappings_that_cannot_be_are_refused(
    tmp_path: Path, mount: Mount, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        mount_all([mount], tmp_path)


@pytest.mark.root
@pytest.mark.parametrize("one_by_one", [True, False])
def test_an_overlay_of_many_layers_whatever_the_kernels_age(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, one_by_one: bool
) -> None:
    monkeypatch.setattr(overlay_mounts, "_layers_one_by_one", lambda: one_by_one)
    layers = [tmp_path / f"{number:03}-{'x' * 40}" / "fs" for number in range(60)]
    for layer in layers:
        layer.mkdir(parents=True)
        (layer / layer.parent.name).touch()
    lower = ":".join(str(layer) for layer in layers)
    root = tmp_path / "root"
    root.mkdir()
    mount_all([Mount("overlay", "overlay", options=(f"lowerdir={lower}",))], root)
    try:
        assert len(list(root.iterdir())) == 60
    finally:
        unmount(root)


@pytest.mark.parametrize("where", ["a/b", "a/../a/b", ""])
def test_an_overlay_shows_short_names_and_its_thread_stays_where_it_was(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not overlay_mounts._layers_one_by_one():
        pytest.skip("this kernel takes all layers in one option")
    layers = tmp_path / where
    layers.mkdir(parents=True, exist_ok=True)
    for name in ("lower", "upper/fs", "upper/work", "root"):
        (layers / name).mkdir(parents=True)
    (layers / "lower" / "file").write_text("seen")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    options = (
        f"lowerdir={tmp_path}/{where}/lower",
        f"upperdir={tmp_path}/{where}/upper/fs/",
        f"workdir={tmp_path}/{where}/upper/work",
    )
    root = layers / "root"
    mount_all([Mount("overlay", "overlay", options=options)], root)
    try:
        assert (root / "file").read_text() == "seen"
        shown = Path("/proc/self/mountinfo").read_text().splitlines()[-1]
        assert "=upper/fs/," in shown
        assert "=lower," in shown
    finally:
        unmount(root)
    assert Path.cwd() == elsewhere


def test_layers_that_are_named_from_here_are_found_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "file").write_text("seen")
    monkeypatch.chdir(tmp_path)
    mount_all([Mount("overlay", "overlay", options=(f"lowerdir=a:{tmp_path}/b",))], Path("root"))
    try:
        assert Path("root/file").read_text() == "seen"
    finally:
        unmount(Path("root"))


def test_a_layer_that_is_missing_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    lower = f"lowerdir={tmp_path}/none:{tmp_path}/neither"
    with pytest.raises(MountFailed, match=f"none.*in {tmp_path}|No such file"):
        mount_all([Mount("overlay", "overlay", options=(lower,))], tmp_path / "root")


def test_layers_too_many_for_one_option_are_seen_from_their_parent_and_the_target_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlay_mounts, "_layers_one_by_one", lambda: False)
    layers = [tmp_path / "layers" / f"{number:03}-{'x' * 40}" for number in range(60)]
    for layer in layers:
        layer.mkdir(parents=True)
    for name in ("layers/upper:1", "layers/work", "root"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    options = (
        f"lowerdir={':'.join(str(layer) for layer in layers)}",
        f"upperdir={tmp_path}/layers/upper:1",
        f"workdir={tmp_path}/layers/work",
    )
    mount_all([Mount("overlay", "overlay", options=options)], Path("root"))
    try:
        Path("root/written").write_text("x")
        assert (tmp_path / "layers" / "upper:1" / "written").read_text() == "x"
    finally:
        unmount(Path("root"))
    assert Path.cwd() == tmp_path
