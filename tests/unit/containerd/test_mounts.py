"""Mount options, and mounts made read-only: what can be told without mounting."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common import linux
from services.common.errors import InvalidArgument, Unimplemented
from services.containerd.mounts import (
    Mount,
    as_readonly,
    mount_all,
    overlay_option,
    parse_options,
)


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        ([], 0, []),
        (["ro", "rbind"], linux.MS_RDONLY | linux.MS_BIND | linux.MS_REC, []),
        (["ro", "rw"], 0, []),
        (["nosuid", "suid", "nodev"], linux.MS_NODEV, []),
        (["defaults", "noexec", "size=1m"], linux.MS_NOEXEC, ["size=1m"]),
        (
            ["lowerdir=/a:/b", "index=off", "volatile"],
            0,
            ["lowerdir=/a:/b", "index=off", "volatile"],
        ),
        (["rprivate"], linux.MS_PRIVATE | linux.MS_REC, []),
    ],
)
def test_options_are_flags_or_data(options: list[str], flags: int, data: list[str]) -> None:
    assert parse_options(options) == (flags, data)


@pytest.mark.parametrize("option", ["loop", "uidmap=0:1:2", "gidmap=0:1:2", "X-containerd.mkdir"])
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


def test_an_empty_list_is_no_mount() -> None:
    with pytest.raises(InvalidArgument, match="empty"):
        mount_all([], Path("/nowhere"))
