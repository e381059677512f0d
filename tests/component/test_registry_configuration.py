"""containerd finds its mirrors where it is told to look."""

from pathlib import Path

import pytest

from services.containerd.config import parse
from services.daemon.clients.connection import Connection
from services.daemon.clients.transfer import ContainerdTransfer
from services.daemon.images.node import Platform
from tests.fakes.containerd import config, node_directory, running_app
from tests.fakes.images import Blobs, build_image
from tests.fakes.registry import FakeRegistry


def test_directories_are_given_as_a_path():
    assert parse([]).registry_hosts == (Path("/etc/theseus/certs.d"),)
    assert parse(["--registry-hosts", "/a:/b"]).registry_hosts == (Path("/a"), Path("/b"))
    assert parse(["--registry-hosts", ""]).registry_hosts == ()


@pytest.mark.root
async def test_a_pull_goes_to_the_mirror_of_hosts_toml():
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    async with FakeRegistry() as registry, node_directory() as directory:
        registry.serve("lib/x", "1", image.manifest, blobs)
        hosts = directory / "hosts" / "r.example"
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(f'[host."http://{registry.address}"]\n')
        async with running_app(directory, registry_hosts=(directory / "hosts",)):
            connection = Connection(config(directory).address, "a")
            await ContainerdTransfer(connection).pull(
                "r.example/lib/x:1",
                platform=Platform("linux", "amd64"),
                snapshotter="overlayfs",
                progress=lambda _: None,
            )
            await connection.channel.close()
        assert {seen.query for seen in registry.seen} == {"ns=r.example"}
