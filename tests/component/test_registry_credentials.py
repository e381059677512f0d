"""Credentials on their way: the daemon answers containerd, which asks while it pulls."""

import asyncio
import random

import pytest

from services.common.errors import Unauthenticated
from services.daemon.clients.connection import Connection
from services.daemon.clients.transfer import ContainerdTransfer
from services.daemon.images.node import Platform, RegistryCredentials
from tests.fakes.cli import until
from tests.fakes.images import Blobs, build_image
from tests.fakes.registry import FakeRegistry, Fault
from tests.fakes.transfer_node import open_transfer_node

BIG = random.Random(7).randbytes(2_500_000)
PASSWORD = RegistryCredentials("user", "pass")


@pytest.fixture
async def node(tmp_path):
    async with open_transfer_node(tmp_path) as node:
        await node.serve()
        yield node


@pytest.fixture
async def transfer(node):
    connection = Connection(node.socket, "a")
    yield ContainerdTransfer(connection)
    await connection.channel.close()


@pytest.fixture
async def registry():
    async with FakeRegistry(anonymous_tokens=False) as registry:
        yield registry


def serve(registry, files=None):
    blobs = Blobs()
    image = build_image(blobs, [files or {"a": b"1"}])
    return registry.serve("lib/x", "1", image.manifest, blobs), image


async def pull(transfer, name, credentials=None):
    await transfer.pull(
        name,
        platform=Platform("linux", "amd64"),
        snapshotter="memory",
        progress=lambda _: None,
        credentials=credentials,
    )


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_a_password_opens_what_is_closed(auth, registry, transfer, node):
    registry.auth = auth
    name, image = serve(registry)
    with pytest.raises(Unauthenticated):
        await pull(transfer, name)
    with pytest.raises(Unauthenticated):
        await pull(transfer, name, RegistryCredentials("user", "wrong"))
    await pull(transfer, name, PASSWORD)
    assert (await node.meta.images.get("a", name)).target.digest == image.manifest.digest
    assert not len(node.streams)


async def test_an_identity_token_is_traded_for_tokens(registry, transfer):
    registry.auth = "bearer"
    name, _ = serve(registry)
    with pytest.raises(Unauthenticated):
        await pull(transfer, name, RegistryCredentials(identity_token="another"))
    await pull(transfer, name, RegistryCredentials(identity_token="identity"))
    [*_, form] = registry.forms
    assert (form["grant_type"], form["refresh_token"]) == ("refresh_token", "identity")
    assert form["scope"] == "repository:lib/x:pull"


async def test_a_registry_token_is_sent_as_it_is(registry, transfer):
    registry.auth = "bearer"
    registry.tokens["ready"] = "repository:lib/x:pull"
    name, _ = serve(registry)
    await pull(transfer, name, RegistryCredentials(registry_token="ready"))
    assert not registry.requests("GET", "/token")


async def test_a_token_that_ends_in_the_middle_of_a_blob_is_renewed(registry, transfer, node):
    registry.auth = "bearer"
    name, image = serve(registry, {"big": BIG})
    layer = image.layers[0]
    registry.faults.append(Fault("revoke", layer.digest, after_bytes=len(BIG) // 2))
    await pull(transfer, name, PASSWORD)
    asked = registry.requests("GET", layer.digest)
    assert len(asked) == 3  # cut, refused with the old token, and the rest with a new one
    assert asked[0].headers["Authorization"] == asked[1].headers["Authorization"]
    assert asked[2].headers["Authorization"] != asked[1].headers["Authorization"]
    assert asked[2].headers["Range"].startswith("bytes=")
    assert layer.digest in await node.digests()


async def test_a_mirror_gets_no_credentials(registry, transfer, node, tmp_path):
    async with FakeRegistry(auth="basic") as mirror:
        registry.auth = "basic"
        name, _ = serve(registry)
        directory = tmp_path / "hosts" / registry.address
        directory.mkdir(parents=True)
        (directory / "hosts.toml").write_text(
            f'server = "http://{registry.address}"\n[host."http://{mirror.address}"]\n'
        )
        node.registries._hosts = (tmp_path / "hosts",)
        await pull(transfer, name, PASSWORD)
        assert mirror.seen
        assert not any("Authorization" in seen.headers for seen in mirror.seen)


async def test_a_pull_that_is_given_up_leaves_no_stream(registry, transfer, node):
    registry.auth = "basic"
    registry.gate = asyncio.Event()
    name, _ = serve(registry)
    task = asyncio.create_task(pull(transfer, name, PASSWORD))
    async with asyncio.timeout(10):
        while not registry.requests("GET", "/blobs/"):
            registry.arrived.clear()
            await registry.arrived.wait()
        assert len(node.streams) == 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not len(node.streams))
