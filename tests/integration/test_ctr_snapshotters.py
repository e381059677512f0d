"""Snapshotters other than the default, chosen by a stock ``ctr``: native, and another service's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.containerd.snapshots.overlay import OverlaySnapshotter
from tests.fakes.containerd import ContainerdProcess, node_directory
from tests.fakes.snapshot_collaborators import RecordedEvents, RecordedLeases
from tests.fakes.snapshotters import opened_database, served
from tests.integration.test_ctr import Ctr, remove_cgroups
from tools import image

pytestmark = pytest.mark.root


@pytest.fixture
def name(registry_address, busybox):
    image.push(busybox, registry_address, "snapshotters", "1")
    return f"{registry_address}/snapshotters:1"


def live(ctr, name, snapshotter):
    """Pull, run, look at, commit and remove, all with one snapshotter."""
    chosen = ("--snapshotter", snapshotter)
    ctr("images", "pull", "--plain-http", *chosen, name)
    told = ctr("run", "--rm", *chosen, name, "c1", "sh", "-c", "echo a > /new; cat /new")
    assert told == "a\n"
    ctr("run", "-d", "--null-io", *chosen, name, "c2", "sleep", "1000")
    snapshots = ("snapshots", *chosen)
    assert "c2" in ctr.rows(*snapshots, "ls")
    [layer] = [row for row in ctr.rows(*snapshots, "ls") if row.startswith("sha256:")]
    assert layer in ctr(*snapshots, "tree")
    assert int(ctr(*snapshots, "usage", "-b", "c2").splitlines()[1].split()[1]) > 0
    ctr(*snapshots, "label", layer, "a=b")
    assert '"a": "b"' in ctr(*snapshots, "info", layer)
    ctr(*snapshots, "rm", layer, code=1)  # c2 stands on it
    assert ctr.rows("snapshots", "ls") == []
    ctr("tasks", "kill", "-s", "KILL", "c2")
    ctr("tasks", "rm", "-f", "c2")
    ctr("containers", "rm", "c2")
    ctr("images", "rm", "--sync", name)
    assert ctr.rows(*snapshots, "ls") == []
    assert ctr.rows("content", "ls") == []
    remove_cgroups()


async def test_native(name):
    async with node_directory() as directory, ContainerdProcess(directory) as containerd:
        ctr = Ctr(containerd)
        assert "native" in ctr("plugins", "ls")
        await asyncio.to_thread(live, ctr, name, "native")
        assert list((directory / "root/snapshots/native").iterdir()) == []
        assert await containerd.stop() == 0


async def test_another_services(name, tmp_path):
    async with node_directory() as directory, opened_database(tmp_path / "there.db") as db:
        socket = directory / "keeper.sock"
        config = tmp_path / "config.toml"
        config.write_text(f'[proxy_plugins.keeper]\ntype = "snapshot"\naddress = "{socket}"\n')
        keeper = OverlaySnapshotter(
            tmp_path / "there", db, events=RecordedEvents(), leases=RecordedLeases()
        )
        await keeper.open()
        containerd = ContainerdProcess(directory, options=("--config", str(config)))
        async with containerd:
            ctr = Ctr(containerd)
            assert "keeper" in ctr("plugins", "ls")
            missing = ("images", "pull", "--plain-http", "--snapshotter", "keeper", name)
            await asyncio.to_thread(ctr, *missing, code=1)
            async with served(keeper, "keeper", socket):
                await asyncio.to_thread(live, ctr, name, "keeper")
            await keeper.close()
            assert list(Path(tmp_path / "there/snapshots/overlayfs").iterdir()) == []
            assert await keeper.infos("default") == []
            assert await containerd.stop() == 0
