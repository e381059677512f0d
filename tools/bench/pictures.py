"""The images of the bench: made on the spot, the same bytes every time, pushed to one registry."""

from __future__ import annotations

import functools
import hashlib
import random
import tarfile
from typing import TYPE_CHECKING

from tools import image

if TYPE_CHECKING:
    from tools.bench.scale import Scale
    from tools.image import Image

_SEED = 1
_BIG_FILES = 6
_LAYERS = 5
_SOURCE_BYTES = 64 << 20
"""Larger than any file, and far more than what a compressor looks back on."""

_MEAN_BYTES = 17_000
"""Mean size of one of many files, as in images of distributions."""


class Pictures:
    """Images in the registry at ``registry``; each is made and pushed when first asked for."""

    busybox_name = "busybox"

    def __init__(self, registry: str, scale: Scale) -> None:
        self._registry = registry
        self._scale = scale
        self._pushed: dict[str, Image] = {}
        self.busybox = image.busybox()
        self._push(self.busybox_name, self.busybox)

    def reference(self, name: str) -> str:
        """What to pull."""
        return f"{self._registry}/{name}:latest"

    def picture(self, reference: str) -> Image:
        """The image that a reference stands for."""
        return self._pushed[reference.removeprefix(f"{self._registry}/").removesuffix(":latest")]

    def many(self) -> str:
        """Reference of an image of many files in several layers."""
        return self._made("many", many_files(self._scale.files))

    def big(self) -> str:
        """Reference of an image of a few big files."""
        return self._made("big", big_files(self._scale.big_mib))

    def chain(self, layers: int) -> str:
        """Reference of an image of ``layers`` layers, each with one small file."""
        return self._made(f"chain{layers}", chain(layers))

    def _made(self, name: str, layers: list[bytes]) -> str:
        if name not in self._pushed:
            self._push(name, image.build(layers))
        return self.reference(name)

    def _push(self, name: str, picture: Image) -> None:
        image.push(picture, self._registry, name, "latest")
        self._pushed[name] = picture


def many_files(count: int) -> list[bytes]:
    """Busybox, and ``count`` files below /data in four further layers; they compress to a third."""
    dice = random.Random(_SEED)
    layers = [image.busybox_layer()]
    share = count // (_LAYERS - 1)
    for layer in range(_LAYERS - 1):
        entries = [(image.entry("data", tarfile.DIRTYPE, mode=0o755), b"")]
        extra = count - share * (_LAYERS - 1) if layer == 0 else 0
        for number in range(share + extra):
            if number % 50 == 0:
                directory = f"data/{layer}/{number // 50}"
                for path in (f"data/{layer}",) if number == 0 else ():
                    entries.append((image.entry(path, tarfile.DIRTYPE, mode=0o755), b""))
                entries.append((image.entry(directory, tarfile.DIRTYPE, mode=0o755), b""))
            size = min(int(dice.expovariate(1 / _MEAN_BYTES)), _SOURCE_BYTES // 2)
            entries.append((image.entry(f"{directory}/{number}"), _content(dice, size)))
        layers.append(image.tar_layer(entries))
    return layers


def big_files(mib: int) -> list[bytes]:
    """Busybox, and ``mib`` MiB in six files in two further layers."""
    dice = random.Random(_SEED)
    layers = [image.busybox_layer()]
    for layer in range(2):
        entries = [
            (image.entry(f"big-{layer}-{number}"), _content(dice, (mib << 20) // _BIG_FILES))
            for number in range(_BIG_FILES // 2)
        ]
        layers.append(image.tar_layer(entries))
    return layers


def chain(layers: int) -> list[bytes]:
    """Busybox, and one file more with each further layer."""
    return [
        image.busybox_layer(),
        *(
            image.tar_layer([(image.entry(f"layer-{number}"), b"%d\n" % number)])
            for number in range(1, layers)
        ),
    ]


def chain_id(picture: Image) -> str:
    """Name of the snapshot of all layers (OCI image specification, "Layer ChainID")."""
    digests = [image.digest_of(layer) for layer in picture.layers]
    found = digests[0]
    for digest in digests[1:]:
        found = f"sha256:{hashlib.sha256(f'{found} {digest}'.encode()).hexdigest()}"
    return found


def _content(dice: random.Random, size: int) -> bytes:
    """Bytes that compress to about two fifths, as those of distributions do."""
    source = _source()
    start = dice.randrange(len(source) - min(size, len(source) - 1))
    found = source[start : start + size]
    while len(found) < size:
        found += source[: size - len(found)]
    return found


@functools.cache
def _source() -> bytes:
    dice = random.Random(_SEED)
    pieces = []
    for number in range(_SOURCE_BYTES // 1000):
        pieces.append(dice.randbytes(330))
        pieces.append((b"line %d of a text as programs have them\n" % number * 20)[:670])
    return b"".join(pieces)
