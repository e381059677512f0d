"""The root file system leaves its place at once; its end, which takes a sync, is another matter."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from services.common.mounts import Mount, mount_all, unmount
from services.common.overlay_mounts import MountFailed
from services.shim.rootfs import RootFs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.root


class Overlay:
    """Directories of one overlay, of which the kernel allows one at a time."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / "rootfs"
        self.upper = directory / "upper"
        lower, work = directory / "lower", directory / "work"
        for path in (lower, self.upper, work, self.place):
            path.mkdir()
        options = (f"lowerdir={lower}", f"upperdir={self.upper}", f"workdir={work}", "index=on")
        self.mount = Mount("overlay", "overlay", options=options)

    def mounted(self) -> RootFs:
        mount_all([self.mount], self.place)
        return RootFs(self.place, [self.mount])


@pytest.fixture
def overlay(tmp_path: Path) -> Overlay:
    return Overlay(tmp_path)


def files() -> list[str]:
    # The listing's own descriptor is in it, with the same number if all others are the same.
    return os.listdir("/proc/self/fd")  # noqa: PTH208 - names will do


async def test_it_leaves_its_place_and_ends(overlay: Overlay) -> None:
    rootfs = overlay.mounted()
    (overlay.place / "written").write_text("x")
    before = files()
    await rootfs.unmount()
    assert list(overlay.place.iterdir()) == []
    await rootfs.ended()
    assert files() == before
    overlay.mounted()  # EBUSY while the first has not ended
    unmount(overlay.place)
    assert (overlay.upper / "written").read_text() == "x"


async def test_it_can_be_unmounted_twice_and_where_there_is_nothing(overlay: Overlay) -> None:
    rootfs = overlay.mounted()
    before = files()
    for _ in range(2):
        await rootfs.unmount()
        await rootfs.ended()
    overlay.place.rmdir()
    await rootfs.unmount()
    await rootfs.ended()
    assert files() == before


async def test_one_in_use_leaves_its_place_and_ends_with_its_last_user(overlay: Overlay) -> None:
    rootfs = overlay.mounted()
    user = os.open(overlay.place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        await rootfs.unmount()
        await rootfs.ended()
        assert not os.path.ismount(overlay.place)
        with pytest.raises(MountFailed):
            overlay.mounted()
    finally:
        os.close(user)
    overlay.mounted()
    unmount(overlay.place)


async def test_what_the_kernel_refuses_is_raised(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    before = files()
    with pytest.raises(MountFailed):
        await RootFs(file / "rootfs", [Mount("bind", str(tmp_path))]).unmount()
    assert files() == before


async def test_without_mounts_there_is_nothing_to_do(tmp_path: Path) -> None:
    rootfs = RootFs(tmp_path, [])
    await rootfs.unmount()
    await rootfs.ended()


@pytest.mark.parametrize("alone", [True, False])
async def test_it_is_mounted_in_a_thread_unless_nobody_else_would_be_held_up(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch, *, alone: bool
) -> None:
    threads = []

    def mount_here(mounts: list[Mount], place: Path) -> None:
        threads.append(threading.current_thread())
        mount_all(mounts, place)

    monkeypatch.setattr("services.shim.rootfs.mounts.mount_all", mount_here)
    rootfs = RootFs(overlay.place, [overlay.mount])
    mounted = rootfs.mount(alone=alone)
    assert mounted.done() == alone
    await mounted
    assert (threads == [threading.main_thread()]) == alone
    (overlay.place / "written").write_text("x")
    await rootfs.take_down(mounted)
    assert not os.path.ismount(overlay.place)
    assert (overlay.upper / "written").read_text() == "x"


@pytest.mark.parametrize("alone", [True, False])
async def test_what_cannot_be_mounted_is_raised_where_it_is_waited_for(
    tmp_path: Path, *, alone: bool
) -> None:
    rootfs = RootFs(tmp_path / "rootfs", [Mount("bind", str(tmp_path / "none"))])
    mounted = rootfs.mount(alone=alone)
    with pytest.raises(MountFailed):
        await mounted
    await rootfs.take_down(mounted)
    assert not os.path.ismount(tmp_path / "rootfs")
