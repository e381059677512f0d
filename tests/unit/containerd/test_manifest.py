"""Indexes, manifests and configurations: what is read, what is refused, what refers to what."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import NotFound, ResourceExhausted
from services.containerd.content.descriptor import Descriptor, Platform
from services.containerd.content.digest import digest_of
from services.containerd.images import media_types
from services.containerd.images.manifest import (
    MalformedManifest,
    describe,
    parse_config,
    parse_index,
    parse_manifest,
)
from services.containerd.images.platform import ordered, parse_platform, runnable_on
from services.containerd.images.tree import check_nesting, child_labels, children, find_manifest
from tests.fakes.images import Blobs, build_image, build_index, described

if TYPE_CHECKING:
    from services.containerd.content.store import ContentReader

DIGEST = digest_of(b"x")
AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


class MemoryContent:
    """The part of a content store that reading documents needs."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    async def read(self, namespace: str, digest: str, *, max_bytes: int) -> bytes:
        assert namespace == "a"
        if digest not in self._blobs.data:
            raise NotFound(f"no {digest}")
        data = self._blobs.data[digest]
        if len(data) > max_bytes:
            raise ResourceExhausted("too large")
        return data


def content(blobs: Blobs) -> ContentReader:
    return MemoryContent(blobs)  # type: ignore[return-value]


def manifest_json(**changes: Any) -> bytes:
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "config": {"mediaType": media_types.OCI_CONFIG, "digest": DIGEST, "size": 1},
        "layers": [{"mediaType": media_types.OCI_LAYER, "digest": DIGEST, "size": 2}],
    }
    document |= changes
    return json.dumps({k: v for k, v in document.items() if v is not ...}).encode()


def test_a_manifest_is_read() -> None:
    manifest = parse_manifest(manifest_json(annotations={"a": "b"}), media_types.OCI_MANIFEST)
    assert manifest.config == Descriptor(media_types.OCI_CONFIG, DIGEST, 1)
    assert manifest.layers == (Descriptor(media_types.OCI_LAYER, DIGEST, 2),)
    assert manifest.annotations == {"a": "b"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"config": ...}, "no config"),
        ({"config": []}, "config is not a descriptor"),
        ({"config": {"digest": DIGEST}}, "config.size"),
        ({"config": {"digest": DIGEST, "size": -1}}, "config.size"),
        ({"config": {"digest": DIGEST, "size": True}}, "config.size"),
        ({"config": {"digest": DIGEST, "size": 1e3}}, "config.size"),
        ({"config": {"digest": "sha256:zz", "size": 1}}, "config.digest"),
        ({"config": {"digest": 5, "size": 1}}, "config.digest"),
        ({"config": {"digest": DIGEST, "size": 1, "mediaType": 5}}, "mediaType"),
        ({"config": {"digest": DIGEST, "size": 1, "urls": "x"}}, "urls"),
        ({"config": {"digest": DIGEST, "size": 1, "annotations": {"a": 1}}}, "annotations"),
        ({"config": {"digest": DIGEST, "size": 1, "platform": {"os": 1}}}, "platform"),
        ({"layers": {}}, "layers is not a list"),
        ({"layers": [None]}, r"layers\[0\]"),
        ({"layers": [{}] * 10_001}, "more than"),
        ({"mediaType": 7}, "mediaType"),
        ({"mediaType": media_types.OCI_INDEX}, "an index was found"),
        ({"manifests": []}, "an index was found"),
        ({"fsLayers": []}, "schema 1"),
        ({"annotations": []}, "annotations"),
    ],
)
def test_a_broken_manifest_is_refused_in_words(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(MalformedManifest, match=why):
        parse_manifest(manifest_json(**changes), media_types.OCI_MANIFEST)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    for parse in (parse_index, parse_manifest):
        with pytest.raises(MalformedManifest):
            parse(data, "x")
    with pytest.raises(MalformedManifest):
        parse_config(data)


def test_a_manifest_is_no_index() -> None:
    with pytest.raises(MalformedManifest, match="a manifest was found"):
        parse_index(manifest_json(), media_types.OCI_INDEX)


def test_a_configuration_is_read() -> None:
    config = parse_config(
        json.dumps(
            {
                "os": "linux",
                "architecture": "x86_64",
                "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
            }
        ).encode()
    )
    assert (config.platform, config.diff_ids) == (AMD64, (DIGEST,))
    assert parse_config(b"{}").diff_ids == ()


@pytest.mark.parametrize(
    "document",
    [
        {"rootfs": {"type": "other", "diff_ids": []}},
        {"rootfs": {"diff_ids": ["nothing"]}},
        {"rootfs": {"diff_ids": {"a": 1}}},
        {"rootfs": 5},
        {"os": 5},
        {"os.features": [1]},
    ],
)
def test_a_broken_configuration_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(MalformedManifest):
        parse_config(json.dumps(document).encode())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["manifests", "config", "layers", "digest", "size", "mediaType", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=10,
    )
)
def test_any_json_is_read_or_refused(document: Any) -> None:
    data = json.dumps(document).encode()
    for parse in (
        lambda: parse_index(data, "i"),
        lambda: parse_manifest(data, "m"),
        lambda: parse_config(data),
    ):
        try:
            parse()
        except MalformedManifest as error:
            assert error.message


def test_describe_is_read_back() -> None:
    descriptor = Descriptor(
        media_types.OCI_MANIFEST,
        DIGEST,
        7,
        annotations={"a": "b"},
        urls=("https://x",),
        platform=Platform("linux", "arm", "v7", "1", ("f",)),
    )
    index = json.dumps({"manifests": [describe(descriptor)]}).encode()
    assert parse_index(index, media_types.OCI_INDEX) == (descriptor,)


async def test_children_are_the_configuration_then_the_layers() -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b"1"}, {"b": b"2"}])
    found = await children(content(blobs), "a", image.manifest)
    assert [child.digest for child in found] == [
        image.config.digest,
        *(layer.digest for layer in image.layers),
    ]
    index = build_index(blobs, [image.manifest])
    assert [c.digest for c in await children(content(blobs), "a", index)] == [image.manifest.digest]
    assert await children(content(blobs), "a", image.layers[0]) == ()


async def test_find_manifest_takes_the_best_for_the_platform() -> None:
    blobs = Blobs()
    images = {
        name: build_image(blobs, [{name: b""}], platform=parse_platform(f"linux/{name}"))
        for name in ("386", "amd64", "amd64/v2", "arm64")
    }
    index = build_index(blobs, [image.manifest for image in images.values()])

    async def best(platform: Platform) -> str:
        found, _ = await find_manifest(content(blobs), "a", index, runnable_on(platform))
        return next(n for n, image in images.items() if image.manifest.digest == found.digest)

    assert await best(AMD64) == "amd64"
    assert await best(Platform("linux", "amd64", "v3")) == "amd64/v2"
    assert await best(Platform("linux", "386")) == "386"
    with pytest.raises(NotFound, match="it has: linux/386, linux/amd64, linux/amd64/v2"):
        await best(Platform("linux", "riscv64"))


async def test_find_manifest_asks_the_configuration_where_the_index_does_not_say() -> None:
    blobs = Blobs()
    amd64 = build_image(blobs, [{"a": b""}], platform=AMD64)
    arm64 = build_image(blobs, [{"b": b""}], platform=ARM64)
    index = blobs.add_json(
        {
            "manifests": [
                {k: v for k, v in described(image.manifest).items() if k != "platform"}
                for image in (amd64, arm64)
            ]
        },
        media_types.OCI_INDEX,
    )
    found, _ = await find_manifest(content(blobs), "a", index, ordered([ARM64]))
    assert found.digest == arm64.manifest.digest
    del blobs.data[amd64.manifest.digest]
    found, _ = await find_manifest(content(blobs), "a", index, ordered([ARM64]))
    assert found.digest == arm64.manifest.digest
    with pytest.raises(NotFound, match="it has: linux/arm64"):
        await find_manifest(content(blobs), "a", index, ordered([AMD64]))


async def test_find_manifest_takes_a_lone_manifest_whatever_it_is_for() -> None:
    blobs = Blobs()
    image = build_image(blobs, [{"a": b""}], platform=ARM64)
    found, _ = await find_manifest(content(blobs), "a", image.manifest, ordered([AMD64]))
    assert found == image.manifest


async def test_find_manifest_refuses_other_types() -> None:
    blobs = Blobs()
    other = blobs.add(b"{}", "application/x")
    with pytest.raises(MalformedManifest, match="'application/x'"):
        await find_manifest(content(blobs), "a", other, ordered([AMD64]))


def test_an_index_inside_itself_is_refused() -> None:
    index = Descriptor(media_types.OCI_INDEX, DIGEST, 1)
    above = check_nesting(index, ())
    with pytest.raises(MalformedManifest, match="contains itself"):
        check_nesting(index, above)


def test_labels_of_children_are_named_as_clients_expect() -> None:
    digests = [digest_of(bytes([n])) for n in range(7)]
    kinds = [
        media_types.OCI_CONFIG,
        media_types.OCI_LAYER_GZIP,
        media_types.DOCKER_LAYER,
        media_types.OCI_MANIFEST,
        media_types.DOCKER_MANIFEST,
        media_types.OCI_INDEX,
        "application/x",
    ]
    labels = child_labels([Descriptor(k, d, 1) for k, d in zip(kinds, digests, strict=True)])
    prefix = "containerd.io/gc.ref.content."
    names = ["config", "l.0", "l.1", "m.0", "m.1", "0", "1"]
    assert labels == {prefix + n: d for n, d in zip(names, digests, strict=True)}
