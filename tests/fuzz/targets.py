"""What is fuzzed: each target takes any bytes, and fails for whatever is no error in words.

A target is a function with seeds to start from. Beside "it does not break", each checks what must
hold for all that is accepted.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zstandard

from services.common.errors import TheseusError
from services.containerd.diff.limits import Limits
from services.containerd.diff.reader import TarReader
from services.containerd.diff.stream import LayerStream
from services.containerd.filters import parse as parse_filters
from services.containerd.images import media_types
from services.containerd.images.manifest import (
    describe,
    parse_config,
    parse_index,
    parse_manifest,
)
from services.containerd.images.platform import parse_platform
from services.containerd.images.reference import parse_familiar_name, parse_reference
from services.containerd.remotes.auth import parse_challenges

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LIMITS = Limits(
    entries=1000, path_bytes=4096, header_bytes=1 << 16, stream_bytes=1 << 20, sparse_pieces=100
)
_DIGEST = "sha256:" + "a1" * 32


@dataclass(frozen=True)
class Target:
    """Something to fuzz."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def read_layer(data: bytes) -> None:
    """A layer, compressed or not; and the same with headers whose checksums are right."""
    _read_layer(data)
    _read_layer(_with_checksums(data))


def _with_checksums(data: bytes) -> bytes:
    blocks = [bytearray(data[at : at + 512]) for at in range(0, len(data), 512)]
    for block in blocks:
        if len(block) == 512 and any(block):
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def _read_layer(data: bytes) -> None:
    with contextlib.suppress(TheseusError), LayerStream(io.BytesIO(data), LIMITS) as stream:
        entries = 0
        for entry in TarReader(stream, LIMITS):
            entries += 1
            assert entry.size_bytes >= 0
            assert len(entry.name) <= LIMITS.path_bytes
            assert entry.mode & ~0o7777 == 0
            entry.name.encode(errors="surrogateescape")
        stream.drain()
        assert entries <= LIMITS.entries
        assert stream.size_bytes <= LIMITS.stream_bytes


def filter_things(data: bytes) -> None:
    """A filter of a List or of Subscribe."""
    text = data.decode(errors="replace")
    with contextlib.suppress(TheseusError):
        wanted = parse_filters([text])
        for thing in ({}, {"name": "x", "labels": "y"}):
            assert wanted.matches(lambda path, thing=thing: thing.get(path[0])) in (True, False)


def read_reference(data: bytes) -> None:
    """The name of an image."""
    text = data.decode(errors="replace")
    for parse in (parse_reference, parse_familiar_name):
        with contextlib.suppress(TheseusError):
            reference = parse(text)
            assert str(parse_reference(str(reference))) == str(reference)
            assert "/../" not in f"/{reference.path}/"
    with contextlib.suppress(TheseusError):
        parse_platform(text)
    for challenge in parse_challenges([text.replace("\n", " ")]):
        assert challenge.scheme == challenge.scheme.lower()


def read_manifest(data: bytes) -> None:
    """An index, a manifest or a configuration."""
    with contextlib.suppress(TheseusError):
        entries = parse_index(data, media_types.OCI_INDEX)
        document = {"manifests": [describe(entry) for entry in entries]}
        again = parse_index(json.dumps(document).encode(), media_types.OCI_INDEX)
        assert [entry.digest for entry in again] == [entry.digest for entry in entries]
    with contextlib.suppress(TheseusError):
        manifest = parse_manifest(data, media_types.OCI_MANIFEST)
        assert all(layer.size_bytes >= 0 for layer in (manifest.config, *manifest.layers))
    with contextlib.suppress(TheseusError):
        parse_config(data)


def _layers() -> list[bytes]:
    tars = []
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for name, type_, link in (
                ("d/", tarfile.DIRTYPE, ""),
                ("d/f", tarfile.REGTYPE, ""),
                ("d/" + "n" * 90 + "/f", tarfile.REGTYPE, ""),
                ("l", tarfile.SYMTYPE, "d/f"),
                ("h", tarfile.LNKTYPE, "d/f"),
                ("c", tarfile.CHRTYPE, ""),
            ):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = type_, link
                info.size = 3 if type_ == tarfile.REGTYPE else 0
                if kind == tarfile.PAX_FORMAT:
                    info.pax_headers = {"SCHILY.xattr.user.k": "v", "mtime": "1.5"}
                tar.addfile(info, io.BytesIO(b"abc"))
        tars.append(buffer.getvalue())
    return [*tars, gzip.compress(tars[0], mtime=0), zstandard.compress(tars[1])]


def _filters() -> list[bytes]:
    return [
        b'name==x,labels."a b"~="^y.*$"',
        b"name!=x",
        b"labels.k",
        b"name~=|a\\|b|",
        b'name=="\\u00e9\\x41\\101"',
    ]


def _references() -> list[bytes]:
    return [
        b"docker.io/library/busybox:1.36",
        b"[::1]:5000/a/b_c/d__e@" + _DIGEST.encode(),
        b"localhost/x:latest",
        b"linux/arm64/v8",
        b'Bearer realm="https://x/t?y=1",service="s\\"t",scope="repository:a:pull"',
    ]


def _manifests() -> list[bytes]:
    blob = {"mediaType": media_types.OCI_LAYER_GZIP, "digest": _DIGEST, "size": 3}
    documents = (
        {
            "schemaVersion": 2,
            "manifests": [
                {**blob, "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
                {**blob, "annotations": {"a": "b"}, "urls": ["https://x"]},
            ],
        },
        {"schemaVersion": 2, "config": blob, "layers": [blob, blob], "annotations": {"k": "v"}},
        {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": [_DIGEST]},
        },
        {"schemaVersion": 1, "fsLayers": []},
    )
    return [json.dumps(document).encode() for document in documents]


TARGETS: dict[str, Target] = {
    "layers": Target(read_layer, _layers),
    "filters": Target(filter_things, _filters),
    "references": Target(read_reference, _references),
    "manifests": Target(read_manifest, _manifests),
}


def words(names: Sequence[str] = tuple(TARGETS)) -> str:
    """The names of the targets, for messages."""
    return ", ".join(names)
