from __future__ import annotations

from pathlib import Path

import pytest

from services.common.errors import InvalidArgument
from services.daemon.volumes.mounts import (
    Mount,
    MountType,
    ResolvedMount,
    check_propagation,
    resolve_bind,
    resolve_tmpfs,
    resolve_volume,
    validate_mounts,
)

BIND, VOLUME, TMPFS = MountType.BIND, MountType.VOLUME, MountType.TMPFS


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        (Mount(BIND, "/s", ""), 'invalid mount config for type "bind": field Target must not be'),
        (Mount(BIND, "/s", "rel"), "invalid mount path: 'rel' mount path must be absolute"),
        (Mount(VOLUME, "v", "//./"), "invalid specification: destination can't be '/'"),
        (Mount(VOLUME, "v", "/a/.."), "invalid specification: destination can't be '/'"),
        (Mount(BIND, "", "/t"), "field Source must not be empty"),
        (Mount(BIND, "rel", "/t"), "invalid mount path: 'rel' mount path must be absolute"),
        (Mount(BIND, "/a\0b", "/t"), "NUL"),
        (Mount(TMPFS, "x", "/t"), 'type "tmpfs": field Source must not be specified'),
        (Mount(BIND, "/s", "/t", options=("fast",)), "invalid mode: fast"),
        (Mount(BIND, "/s", "/t", options=("nocopy",)), "invalid mode: nocopy"),
        (Mount(BIND, "/s", "/t", options=("shared", "slave")), "invalid mode: shared,slave"),
        (Mount(TMPFS, "", "/t", options=("size=lots",)), "invalid mode: size=lots"),
        (Mount(TMPFS, "", "/t", options=("context=x",)), "invalid mode: context=x"),
    ],
)
def test_bad_mounts_are_refused(mount: Mount, message: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        validate_mounts([mount])
    assert message in refused.value.message


def test_good_mounts_are_taken() -> None:
    validate_mounts(
        [
            Mount(BIND, "/s", "/a", options=("ro", "rslave", "z")),
            Mount(VOLUME, "", "/b", options=("nocopy",)),
            Mount(TMPFS, "", "/c", options=("size=64m", "mode=1777", "exec")),
        ]
    )


def test_a_target_is_had_once() -> None:
    with pytest.raises(InvalidArgument, match="Duplicate mount point: /a/b"):
        validate_mounts([Mount(VOLUME, "v", "/a/b"), Mount(VOLUME, "w", "/a//b/")])


def test_a_bind_needs_its_source(tmp_path: Path) -> None:
    source = tmp_path / "deep/er"
    with pytest.raises(InvalidArgument) as refused:
        resolve_bind(Mount(BIND, str(source), "/t"))
    assert refused.value.message == (
        f'invalid mount config for type "bind": bind source path does not exist: {source}'
    )
    resolved = resolve_bind(Mount(BIND, str(source), "/t/", True, create_source=True))
    assert source.is_dir()
    assert resolved == ResolvedMount(BIND, str(source), "/t", True, ("rbind", "rprivate"))
    assert resolved.is_bind


def test_options_of_a_bind(tmp_path: Path) -> None:
    resolved = resolve_bind(Mount(BIND, str(tmp_path), "/t", options=("bind", "private", "ro")))
    assert resolved.options == ("bind", "private")
    assert resolved.read_only


MOUNTINFO = """\
20 1 8:1 / / rw - ext4 /dev/vda rw
21 20 8:2 / /shared\\040dir rw shared:5 - ext4 /dev/vdb rw
22 20 8:3 / /slave rw master:5 - ext4 /dev/vdc rw
"""


@pytest.mark.parametrize(
    ("path", "propagation", "missing"),
    [
        ("/x", "rprivate", ""),
        ("/x", "rshared", "path /x is mounted on / but it is not a shared mount"),
        ("/x", "slave", "path /x is mounted on / but it is not a shared or slave mount"),
        ("/shared dir/x", "rshared", ""),
        ("/shared dir/x", "rslave", ""),
        ("/slave", "rslave", ""),
        ("/slave", "shared", "path /slave is mounted on /slave but it is not a shared mount"),
    ],
)
def test_propagation_must_be_possible(
    path: str, propagation: str, missing: str, tmp_path: Path
) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTINFO)
    if not missing:
        check_propagation(Path(path), propagation, mountinfo=mountinfo)
        return
    with pytest.raises(InvalidArgument) as refused:
        check_propagation(Path(path), propagation, mountinfo=mountinfo)
    assert refused.value.message == missing


def test_options_of_tmpfs_replace_opposite_defaults() -> None:
    mount = Mount(TMPFS, "", "/t", options=("exec", "size=1m", "size=2m", "ro", "mode=755"))
    assert resolve_tmpfs(mount) == ResolvedMount(
        TMPFS, "tmpfs", "/t", True, ("nosuid", "nodev", "exec", "size=2m", "mode=755")
    )


def test_a_volume_is_a_bind_of_its_directory() -> None:
    mount = Mount(VOLUME, "v", "/t", options=("nocopy",))
    resolved = resolve_volume(mount, name="v", mountpoint=Path("/m"))
    assert resolved == ResolvedMount(
        VOLUME, "/m", "/t", False, ("rbind", "rprivate"), volume="v", copy_up=False
    )
    assert resolved.is_bind
