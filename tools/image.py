"""Small images made on the spot, for the demo, the bench and the tests: busybox, or any files.

An image here is its blobs in memory. It can be pushed to a registry on loopback, or written as an
OCI layout archive or as ``docker save`` writes one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

BUSYBOX = Path("/bin/busybox")
"""Debian's busybox-static."""

_APPLETS = (
    "ash cat chmod cp cut date dd echo env expr false grep head hostname httpd id ip kill ln ls "
    "mkdir mount mv nc nslookup ping printf ps pwd rm seq sh sleep sort stty tail tee test touch "
    "tr true tty umount uname uniq vi wc wget which whoami yes"
)

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_LAYERS_GZIP = {
    MANIFEST: LAYER_GZIP,
    DOCKER_MANIFEST: "application/vnd.docker.image.rootfs.diff.tar.gzip",
}
_CONFIGS = {MANIFEST: CONFIG, DOCKER_MANIFEST: "application/vnd.docker.container.image.v1+json"}


@dataclass(frozen=True, slots=True)
class Image:
    """An image for one platform.

    Attributes:
        manifest: the manifest's bytes.
        blobs: digest to bytes, of configuration and layers.
        layers: the layers uncompressed, bottom first.
    """

    manifest: bytes
    media_type: str
    blobs: dict[str, bytes]
    layers: tuple[bytes, ...]
    config: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        """Digest of the manifest."""
        return digest_of(self.manifest)


def digest_of(data: bytes) -> str:
    """The sha256 digest of ``data`` as registries write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def tar_layer(entries: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """An uncompressed layer; sizes are filled in."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in entries:
            if data:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, *, mode: int = 0o644, **values: Any) -> Any:
    """A ``TarInfo``; ``values`` are its further attributes."""
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, mode
    for key, value in values.items():
        setattr(info, key, value)
    return info


def busybox_layer(files: dict[str, bytes] | None = None) -> bytes:
    """A root file system of busybox with its usual directories and accounts, plus ``files``."""
    directory = tarfile.DIRTYPE
    entries = [
        (entry(name, directory, mode=0o755), b"")
        for name in ("bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var")
    ]
    entries.append((entry("tmp", directory, mode=0o1777), b""))
    entries.append((entry("bin/busybox", mode=0o755), BUSYBOX.read_bytes()))
    entries += [
        (entry(f"bin/{applet}", tarfile.SYMTYPE, mode=0o777, linkname="busybox"), b"")
        for applet in _APPLETS.split()
    ]
    accounts = {
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n"
        b"nobody:x:65534:65534:nobody:/home:/bin/false\n",
        "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
    }
    entries += [(entry(name), data) for name, data in (accounts | (files or {})).items()]
    return tar_layer(entries)


def build(
    layers: list[bytes],
    *,
    media_type: str = MANIFEST,
    target: dict[str, str] | None = None,
    **config: Any,
) -> Image:
    """An image of uncompressed ``layers``; ``config`` has keys such as Cmd, Env, Entrypoint."""
    compressed = [gzip.compress(layer, 1, mtime=0) for layer in layers]
    configuration = json.dumps(
        {
            "created": "2024-01-01T00:00:00Z",
            **(target or {"os": "linux", "architecture": _architecture()}),
            "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["sh"], **config},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
            "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "tools/image.py"}]
            * len(layers),
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": _descriptor(_CONFIGS[media_type], configuration),
            "layers": [_descriptor(_LAYERS_GZIP[media_type], data) for data in compressed],
        }
    ).encode()
    blobs = {digest_of(data): data for data in [configuration, *compressed]}
    return Image(manifest, media_type, blobs, tuple(layers), configuration)


def busybox(**config: Any) -> Image:
    """The busybox image."""
    return build([busybox_layer()], **config)


def push(image: Image, registry: str, repository: str, tag: str) -> None:
    """Put an image into the registry at ``HOST:PORT`` by the distribution API."""
    base = f"http://{registry}/v2/{repository}"
    for digest, data in image.blobs.items():
        with _request("POST", f"{base}/blobs/uploads/") as answer:
            location = answer.headers["Location"]
        separator = "&" if "?" in location else "?"
        url = f"{location}{separator}{urlencode({'digest': digest})}"
        _request("PUT", url, data, "application/octet-stream").close()
    for reference in (tag, image.digest):
        _request("PUT", f"{base}/manifests/{reference}", image.manifest, image.media_type).close()


def write_oci_archive(image: Image, path: Path, name: str) -> None:
    """Write an OCI layout as a tar archive that names the image ``name``."""
    descriptor = _descriptor(image.media_type, image.manifest)
    descriptor["annotations"] = {"io.containerd.image.name": name}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]}
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps(index).encode(),
    }
    for digest, data in {**image.blobs, image.digest: image.manifest}.items():
        files[f"blobs/{digest.replace(':', '/')}"] = data
    _write_tar(path, files)


def write_docker_archive(image: Image, path: Path, name: str) -> None:
    """Write an archive as ``docker save`` writes it: manifest.json and uncompressed layers."""
    config_name = f"{digest_of(image.config).removeprefix('sha256:')}.json"
    layer_names = [
        f"{digest_of(layer).removeprefix('sha256:')}/layer.tar" for layer in image.layers
    ]
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": layer_names}]
    files = {config_name: image.config, "manifest.json": json.dumps(manifest).encode()}
    _write_tar(path, files | dict(zip(layer_names, image.layers, strict=True)))


def _write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.write_bytes(tar_layer([(entry(name), data) for name, data in files.items()]))


def _descriptor(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}


def _request(method: str, url: str, data: bytes | None = None, media_type: str = "") -> Any:
    headers = {"Content-Type": media_type} if media_type else {}
    if method == "POST":
        headers["Content-Length"] = "0"
    request = urllib.request.Request(url, data, headers, method=method)
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
