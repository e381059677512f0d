"""What an earlier containerd left in the state directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from services.common.errors import NotFound
from services.common.frozen import frozen
from services.containerd.tasks.bundle import GONE_FILE
from services.containerd.tasks.gone import Epitaph

if TYPE_CHECKING:
    from services.containerd.tasks.bundle import Bundle, Bundles, ShimRecord

log = structlog.get_logger(__name__)


@frozen
class FoundBundle:
    """A bundle as it was found at start.

    Attributes:
        record: None where shim.json is no record: the bundle is rubbish.
        deletion: the note of a removal that has begun.
        epitaph: there if its shim was buried.
    """

    bundle: Bundle
    record: ShimRecord | None
    deletion: dict[str, Any] | None
    epitaph: Epitaph | None


def look_around(bundles: Bundles) -> list[FoundBundle]:
    """Every bundle that is there, with what its files say. Blocks."""
    return [
        FoundBundle(bundle, _record(bundle), bundle.deletion(), _epitaph(bundle))
        for bundle in bundles.all()
    ]


def _record(bundle: Bundle) -> ShimRecord | None:
    try:
        return bundle.record()
    except NotFound:
        return None


def _epitaph(bundle: Bundle) -> Epitaph | None:
    try:
        return Epitaph.from_json(bundle.id, bundle.read_json(GONE_FILE))
    except NotFound:
        return None
    except (KeyError, TypeError, ValueError, AttributeError):
        log.error("epitaph is unreadable", path=str(bundle.path / GONE_FILE))
        return None
