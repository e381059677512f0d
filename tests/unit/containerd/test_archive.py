"""Archives: OCI layouts and docker save, in and out, and what is wrong with some."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from services.common.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    TheseusError,
)
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.content.digest import digest_of
from services.containerd.images import media_types
from services.containerd.images.archive import (
    IMAGE_NAME,
    REF_NAME,
    ArchiveLimits,
    ArchiveReader,
)
from services.containerd.images.archive_writer import ArchiveWriter, ExportOptions
from services.containerd.images.decompress import decompressed
from services.containerd.images.manifest import parse_index, parse_manifest
from services.containerd.images.platform import ordered
from services.containerd.transfer.destination import Destination, ExtraName, Unpacking
from services.containerd.transfer.progress import report_nothing
from tests.fakes.images import Blobs, build_image, build_index, described, layer_tar
from tests.fakes.transfer_node import TransferNode, open_transfer_node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tests.fakes.images import BuiltImage

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")
NAME = "docker.io/library/x:1"
LAYOUT = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()
PREFIX = (ExtraName("docker.io/library/x", is_prefix=True),)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[TransferNode]:
    async with open_transfer_node(tmp_path) as node:
        yield node


def tar(files: dict[str, bytes], *, links: dict[str, str] | None = None, kind: int = 0) -> bytes:
    buffer = io.BytesIO()
    formats = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=formats[kind]) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


async def pieces(data: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


def oci_archive(blobs: Blobs, entries: list[Descriptor], **extra: bytes) -> dict[str, bytes]:
    index = {"schemaVersion": 2, "manifests": [described(entry) for entry in entries]}
    files = {"oci-layout": LAYOUT, "index.json": json.dumps(index).encode(), **extra}
    for digest, data in blobs.data.items():
        files["blobs/" + digest.replace(":", "/")] = data
    return files


def named(descriptor: Descriptor, name: str = NAME) -> Descriptor:
    return Descriptor(
        descriptor.media_type,
        descriptor.digest,
        descriptor.size_bytes,
        annotations={IMAGE_NAME: name, REF_NAME: name.rpartition(":")[2]},
        platform=descriptor.platform,
    )


def docker_archive(
    tags: list[str] | None = None, **changes: Any
) -> tuple[dict[str, bytes], list[bytes]]:
    layers = [layer_tar({"a": b"1"}), layer_tar({"b": b"2"})]
    config = json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        }
    ).encode()
    listed = [
        {
            "Config": "c.json",
            "RepoTags": ["x:1"] if tags is None else tags,
            "Layers": ["1/layer.tar", "2/layer.tar"],
            **changes,
        }
    ]
    files = {
        "1/VERSION": b"1.0",
        "1/json": b"{}",
        "1/layer.tar": layers[0],
        "2/layer.tar": layers[1],
        "c.json": config,
        "manifest.json": json.dumps(listed).encode(),
        "repositories": b"{}",
    }
    return files, layers


async def load(node: TransferNode, data: bytes, **options: Any) -> tuple[Descriptor, ...]:
    limits = options.pop("limits", None)
    reader = ArchiveReader(node.content, limits=limits)
    index = await reader.load("a", pieces(data), **options)
    assert index.media_type == media_types.OCI_INDEX
    return parse_index(await node.content.read("a", index.digest), index.media_type)


async def saved(
    node: TransferNode, images: list[tuple[str, Descriptor]], options: ExportOptions | None = None
) -> bytes:
    writer = ArchiveWriter(node.content)
    return b"".join([piece async for piece in writer.save("a", images, options or ExportOptions())])


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "gzip": gzip.compress,
    "gzip members": lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
    "zstd": zstandard.compress,
    "zstd frames": lambda data: b"".join(
        zstandard.compress(data[at : at + 300]) for at in range(0, len(data), 300)
    ),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_an_oci_layout_is_taken_with_its_names(node: TransferNode, compression: str) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    data = tar(oci_archive(blobs, [named(image.manifest)]))
    [entry] = await load(node, COMPRESSIONS[compression](data))
    assert entry.digest == image.manifest.digest
    assert entry.annotations[IMAGE_NAME] == NAME
    assert set(blobs.data) < await node.digests()
    assert await node.content.statuses("a") == []


async def test_an_archive_loaded_twice_is_no_error(node: TransferNode) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    data = tar(oci_archive(blobs, [named(image.manifest)]))
    assert await load(node, data) == await load(node, data)


async def test_docker_save_is_described_anew(node: TransferNode) -> None:
    files, layers = docker_archive(["x:1", "r.example/y"])
    first, second = await load(node, tar(files))
    assert first.annotations == {IMAGE_NAME: NAME, REF_NAME: "1"}
    assert second.annotations[IMAGE_NAME] == "r.example/y:latest"
    assert first.digest == second.digest
    assert first.platform == AMD64
    manifest = parse_manifest(await node.content.read("a", first.digest), first.media_type)
    assert manifest.config.media_type == media_types.DOCKER_CONFIG
    assert [layer.media_type for layer in manifest.layers] == [media_types.DOCKER_LAYER] * 2
    assert [layer.digest for layer in manifest.layers] == [digest_of(layer) for layer in layers]


async def test_docker_save_follows_links_between_layers(node: TransferNode) -> None:
    files, layers = docker_archive()
    del files["2/layer.tar"]
    [entry] = await load(node, tar(files, links={"2/layer.tar": "../1/layer.tar"}))
    manifest = parse_manifest(await node.content.read("a", entry.digest), entry.media_type)
    assert [layer.digest for layer in manifest.layers] == [digest_of(layers[0])] * 2


async def test_links_in_a_circle_are_not_followed_for_ever(node: TransferNode) -> None:
    files, _ = docker_archive()
    del files["2/layer.tar"]
    with pytest.raises(NotFound, match="no file"):
        await load(node, tar(files, links={"2/layer.tar": "x", "2/x": "layer.tar"}))


async def test_docker_layers_are_compressed_on_demand(node: TransferNode) -> None:
    files, layers = docker_archive()
    [entry] = await load(node, tar(files), compress=True)
    manifest = parse_manifest(await node.content.read("a", entry.digest), entry.media_type)
    for layer, data in zip(manifest.layers, layers, strict=True):
        assert layer.media_type == media_types.DOCKER_LAYER_GZIP
        packed = await node.content.read("a", layer.digest)
        assert len(packed) == layer.size_bytes
        assert gzip.decompress(packed) == data
        labels = (await node.content.info("a", layer.digest)).labels
        assert labels == {"containerd.io/uncompressed": digest_of(data)}


async def test_docker_layers_that_are_compressed_are_seen_to_be(node: TransferNode) -> None:
    files, layers = docker_archive()
    files["1/layer.tar"] = gzip.compress(layers[0])
    [entry] = await load(node, tar(files))
    manifest = parse_manifest(await node.content.read("a", entry.digest), entry.media_type)
    assert [layer.media_type for layer in manifest.layers] == [
        media_types.DOCKER_LAYER_GZIP,
        media_types.DOCKER_LAYER,
    ]


@pytest.mark.parametrize("kind", [0, 1])
async def test_long_names_are_read_in_every_format(node: TransferNode, kind: int) -> None:
    files, _ = docker_archive(Layers=["d" * 150 + "/1.tar", "d" * 150 + "/2.tar"])
    for number in ("1", "2"):
        files["d" * 150 + f"/{number}.tar"] = files.pop(f"{number}/layer.tar")
    assert await load(node, tar(files, kind=kind))


async def broken(node: TransferNode, data: bytes, **options: Any) -> TheseusError:
    with pytest.raises(TheseusError) as caught:
        await load(node, data, **options)
    assert await node.content.statuses("a") == []
    return caught.value


async def test_what_is_no_archive_of_images_is_refused(node: TransferNode) -> None:
    for data, kind, why in [
        (b"", InvalidArgument, "neither"),
        (tar({"a": b"1"}), InvalidArgument, "neither"),
        (b"hello" * 1000, InvalidArgument, "no tar"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 100, DataLoss, "zstd stream is corrupt"),
        (zstandard.compress(bytes(10 << 20))[:-1], DataLoss, "zstd stream is cut short"),
        (b"\x1f\x8b" + b"x" * 100, DataLoss, "gzip"),
        (gzip.compress(tar({"a": b"1"}))[:-20], DataLoss, "cut short"),
        (tar({"oci-layout": b"{}"}), InvalidArgument, "version None"),
        (tar({"oci-layout": b"["}), InvalidArgument, "not JSON"),
        (tar({"oci-layout": LAYOUT}), NotFound, "index.json"),
        (tar({"oci-layout": LAYOUT, "index.json": b"[]"}), InvalidArgument, "JSON object"),
        (tar({"manifest.json": b"{}"}), InvalidArgument, "list of images"),
        (tar({"manifest.json": b"[{}]"}), InvalidArgument, "without Config"),
        (tar({"manifest.json": b'[{"Config": "x"}]'}), NotFound, "'x'"),
        (tar({"manifest.json": b'[{"Config": "x", "Layers": 1}]'}), InvalidArgument, "names"),
    ]:
        error = await broken(node, data)
        assert isinstance(error, kind), (data[:20], error)
        assert why in error.message, error


async def test_an_archive_that_is_cut_short_is_data_loss(node: TransferNode) -> None:
    files, _ = docker_archive()
    data = tar(files)
    for length in (100, 700, 3000):
        assert isinstance(await broken(node, data[:length]), DataLoss)


async def test_a_blob_that_is_not_what_its_name_says_is_data_loss(node: TransferNode) -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}])
    files = oci_archive(blobs, [named(image.manifest)])
    files["blobs/" + image.config.digest.replace(":", "/")] = b"something else"
    error = await broken(node, tar(files))
    assert isinstance(error, DataLoss)
    assert image.config.digest not in await node.digests()


async def test_a_zstd_archive_that_is_nearly_nothing_is_expanded_in_bounded_pieces() -> None:
    bomb = zstandard.compress(bytes(300 << 20))
    assert len(bomb) < 20_000
    largest = total = 0
    async for piece in decompressed(pieces(bomb, 1 << 20)):
        largest, total = max(largest, len(piece)), total + len(piece)
    assert total == 300 << 20
    assert largest <= 32 << 20


async def test_limits_are_kept(node: TransferNode) -> None:
    files, _ = docker_archive()
    data = tar(files)
    for limits, why in [
        (ArchiveLimits(entries=3), "more than 3 entries"),
        (ArchiveLimits(total_bytes=5000), "more than 5000 bytes"),
        (ArchiveLimits(document_bytes=10), "more than 10"),
    ]:
        error = await broken(node, data, limits=limits)
        assert isinstance(error, ResourceExhausted)
        assert why in error.message
    bomb = gzip.compress(tar({"zeros": bytes(50 << 20)}))
    error = await broken(node, bomb, limits=ArchiveLimits(total_bytes=1 << 20))
    assert isinstance(error, ResourceExhausted)


async def put_image(node: TransferNode, platforms: list[Platform]) -> tuple[Blobs, Any]:
    blobs = Blobs()
    images = [build_image(blobs, [{p.architecture: b"1"}], platform=p) for p in platforms]
    index = build_index(blobs, [image.manifest for image in images])
    await load(node, tar(oci_archive(blobs, [index])))
    return blobs, (index, images)


def listed(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member)
            found[member.name] = file.read() if file else b""
        return found


async def test_an_export_has_both_forms_and_loads_again(node: TransferNode) -> None:
    blobs, (index, images) = await put_image(node, [AMD64, ARM64])
    data = await saved(node, [(NAME, index)], ExportOptions(ordered([AMD64])))
    files = listed(data)
    assert list(files) == sorted(files)
    image: BuiltImage = images[0]
    expected = {index.digest, image.manifest.digest, image.config.digest, image.layers[0].digest}
    assert {name for name in files if name.count("/") == 2} == {
        "blobs/" + digest.replace(":", "/") for digest in expected
    }
    [docker] = json.loads(files["manifest.json"])
    assert docker["RepoTags"] == ["x:1"]
    assert docker["Config"] == "blobs/" + image.config.digest.replace(":", "/")
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    [entry] = await load(node, data)
    assert (entry.digest, entry.annotations[IMAGE_NAME]) == (index.digest, NAME)
    assert set(blobs.data) > expected


async def test_an_export_of_all_platforms_needs_them_all(node: TransferNode) -> None:
    _, (index, images) = await put_image(node, [AMD64, ARM64])
    options = ExportOptions(ordered([AMD64]), all_platforms=True, docker=False)
    files = listed(await saved(node, [(NAME, index)], options))
    assert "manifest.json" not in files
    assert "blobs/" + images[1].layers[0].digest.replace(":", "/") in files
    await node.content.delete("a", images[1].layers[0].digest)
    with pytest.raises(NotFound):
        await saved(node, [(NAME, index)], options)


async def test_an_export_for_a_missing_platform_is_not_found(node: TransferNode) -> None:
    _, (index, _) = await put_image(node, [AMD64])
    with pytest.raises(NotFound, match="it has: linux/amd64"):
        await saved(node, [(NAME, index)], ExportOptions(ordered([ARM64])))


async def test_an_export_of_a_damaged_blob_is_data_loss(node: TransferNode) -> None:
    _, (index, images) = await put_image(node, [AMD64])
    path = await node.content.path("a", images[0].layers[0].digest)
    data = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(DataLoss, match="damaged"):
        await saved(node, [(NAME, index)])


async def test_load_records_unpacks_and_chooses_names(node: TransferNode) -> None:
    files, _ = docker_archive(["x:1", "other:1"])
    images = await node.transfers.load(
        "a",
        pieces(tar(files)),
        Destination(extra_names=PREFIX, unpackings=(Unpacking(),)),
        report_nothing,
    )
    assert [image.name for image in images] == [NAME]
    assert len(node.snapshotter.names()) == 2
    assert await node.meta.leases.find("a") == []
    everything = (ExtraName("docker.io/library/x", is_prefix=True, allow_overwrite=True),)
    images = await node.transfers.load(
        "a", pieces(tar(files)), Destination(extra_names=everything), report_nothing
    )
    assert [image.name for image in images] == [NAME, "docker.io/library/other:1"]


async def test_load_names_what_has_no_name_by_its_digest(node: TransferNode) -> None:
    files, _ = docker_archive([])
    extra = (ExtraName("loaded", is_prefix=True, add_digest=True, skip_named_digest=True),)
    index, image = await node.transfers.load(
        "a", pieces(tar(files)), Destination(extra_names=extra), report_nothing
    )
    assert image.name == f"loaded@{image.target.digest}"
    assert image.target.media_type == media_types.DOCKER_MANIFEST
    assert index.name == f"loaded@{index.target.digest}"
    with pytest.raises(NotFound, match="name"):
        await node.transfers.load(
            "a", pieces(tar(files)), Destination(extra_names=PREFIX), report_nothing
        )


async def test_load_can_name_the_whole_archive(node: TransferNode) -> None:
    files, _ = docker_archive()
    [image] = await node.transfers.load(
        "a", pieces(tar(files)), Destination(name="all:1"), report_nothing
    )
    assert (image.name, image.target.media_type) == ("all:1", media_types.OCI_INDEX)


async def test_load_passes_over_manifests_that_an_archive_leaves_out(node: TransferNode) -> None:
    blobs = Blobs()
    amd64 = build_image(blobs, [{"a": b"1"}], platform=AMD64)
    arm64 = build_image(blobs, [{"b": b"1"}], platform=ARM64)
    index = build_index(blobs, [amd64.manifest, arm64.manifest])
    del blobs.data[arm64.manifest.digest]
    files = oci_archive(blobs, [named(index)])
    [image] = await node.transfers.load(
        "a", pieces(tar(files)), Destination(extra_names=PREFIX), report_nothing
    )
    assert image.target.digest == index.digest
    del files["blobs/" + amd64.layers[0].digest.replace(":", "/")]
    await node.content.delete("a", amd64.layers[0].digest)
    with pytest.raises(NotFound, match="layer-"):
        await node.transfers.load(
            "a", pieces(tar(files)), Destination(extra_names=PREFIX), report_nothing
        )
