"""One page of metrics out of many: every sample gets its shim as labels, families are merged.

Pages are in Prometheus' text format 0.0.4. A family's HELP and TYPE are written once, before its
samples, wherever those come from.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from services.common.errors import TheseusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from services.containerd.tasks.shim import Shim

_SUFFIXES = ("_bucket", "_sum", "_count", "_created", "_total")


async def scrape(shims: Sequence[tuple[str, str, Shim]], *, timeout_s: float) -> tuple[bytes, int]:
    """Ask all shims at once, and take what comes in time.

    Args:
        shims: (namespace, id, shim) of each.
        timeout_s: for all of them together.

    Returns:
        The merged page, and how many did not answer.
    """
    asked = {
        asyncio.ensure_future(shim.metrics()): (namespace, identity)
        for namespace, identity, shim in shims
    }
    if not asked:
        return b"", 0
    try:
        done, late = await asyncio.wait(asked, timeout=timeout_s)
    finally:
        for call in asked:
            call.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    pages = []
    unanswered = len(late)
    for call in done:
        error = call.exception()
        if error is None:
            pages.append((*asked[call], call.result()))
        elif isinstance(error, TheseusError):
            unanswered += 1
        else:
            raise error
    return await asyncio.to_thread(merge, sorted(pages)), unanswered


def merge(pages: Iterable[tuple[str, str, bytes]]) -> bytes:
    """Merge (namespace, id, page) into one page."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for namespace, identity, page in pages:
        labels = f'namespace="{_escape(namespace)}",shim="{_escape(identity)}"'
        family = ""
        for line in page.decode(errors="replace").split("\n"):
            if line.startswith("#"):
                words = line.split(" ", 3)
                if len(words) < 4 or words[1] not in ("HELP", "TYPE"):
                    continue
                family = words[2]
                head, _ = families.setdefault(family, ([], []))
                if not any(known.startswith(f"# {words[1]} ") for known in head):
                    head.append(line)
            elif line:
                name = _name(line)
                if not _belongs(name, family):
                    family = name
                _, samples = families.setdefault(family, ([], []))
                samples.append(_labelled(line, name, labels))
    lines = [line for head, samples in families.values() for line in (*head, *samples)]
    return "".join(f"{line}\n" for line in lines).encode()


def _name(sample: str) -> str:
    end = min((at for at in (sample.find("{"), sample.find(" ")) if at >= 0), default=len(sample))
    return sample[:end]


def _belongs(name: str, family: str) -> bool:
    return name == family or any(name == family + suffix for suffix in _SUFFIXES)


def _labelled(sample: str, name: str, labels: str) -> str:
    rest = sample[len(name) :]
    if rest.startswith("{}"):
        return f"{name}{{{labels}}}{rest[2:]}"
    if rest.startswith("{"):
        return f"{name}{{{labels},{rest[1:]}"
    return f"{name}{{{labels}}}{rest}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
