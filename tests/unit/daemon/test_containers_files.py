"""Files that containers see at /etc."""

from __future__ import annotations

import pytest

from services.daemon.containers.files import ContainerFiles, HostFiles
from services.daemon.containers.record import ContainerId

ID = ContainerId("a" * 64)


@pytest.fixture
def host(tmp_path):
    made = HostFiles(tmp_path / "hosts", tmp_path / "resolv.conf", tmp_path / "resolved.conf")
    made.hosts.write_text("192.0.2.1 host\n")
    made.resolv_conf.write_text("nameserver 192.0.2.53\nsearch example\n")
    return made


@pytest.fixture
def files(tmp_path, host):
    made = ContainerFiles(tmp_path / "containers", host=host)
    made.create(ID)
    return made


def written(files, *, address="10.0.0.2", hostname="box", host_network=False):
    paths = files.write(ID, hostname=hostname, address=address, host_network=host_network)
    from pathlib import Path

    return {target: Path(source).read_text() for target, source in paths.items()}


def test_a_container_knows_its_own_name(files):
    found = written(files)
    assert found["/etc/hostname"] == "box\n"
    assert found["/etc/hosts"].endswith("10.0.0.2\tbox\n")
    assert "127.0.0.1\tlocalhost" in found["/etc/hosts"]
    assert written(files, hostname="a.b")["/etc/hosts"].endswith("10.0.0.2\ta.b a\n")
    assert "box" not in written(files, address="")["/etc/hosts"]


def test_name_servers_on_the_hosts_loopback_are_of_no_use(files, host):
    assert written(files)["/etc/resolv.conf"] == "nameserver 192.0.2.53\nsearch example\n"
    host.resolv_conf.write_text("nameserver 127.0.0.53\nnameserver ::1\noptions edns0\n")
    host.resolved.write_text("nameserver 192.0.2.54\n")
    assert written(files)["/etc/resolv.conf"] == "nameserver 192.0.2.54\n"
    host.resolved.unlink()
    assert "nameserver 8.8.8.8" in written(files)["/etc/resolv.conf"]
    assert "127.0.0.53" not in written(files)["/etc/resolv.conf"]


def test_on_the_hosts_network_the_hosts_files_hold(files, host):
    host.resolv_conf.write_text("nameserver 127.0.0.53\n")
    found = written(files, host_network=True)
    assert found["/etc/hosts"] == "192.0.2.1 host\n"
    assert found["/etc/resolv.conf"] == "nameserver 127.0.0.53\n"


def test_a_file_that_is_mounted_keeps_its_inode(files):
    written(files)
    path = files.directory(ID) / "hosts"
    inode = path.stat().st_ino
    written(files, address="10.0.0.3")
    assert path.stat().st_ino == inode


def test_strangers_are_swept(files):
    files.create(ContainerId("b" * 64))
    assert files.sweep({ID}) == ["b" * 64]
    files.remove(ID)
    files.remove(ID)
    assert files.sweep(set()) == []
