"""What an earlier containerd left in the state directory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from services.common.errors import NotFound
from services.common.frozen import frozen
from services.containerd.tasks.bundle import GONE_FILE
from services.containerd.tasks.gone import Epitaph

if TYPE_CHECKING:
    from services.containerd.tasks.bundle import Bundle, Bundles, ShimRecord
    from services.containerd.tasks.journal import TaskJournal

log = structlog.get_logger(__name__)


@frozen
class FoundBundle:
    """A bundle as it was found at start.

    Attributes:
        record: None where shim.json is no record: the bundle is rubbish.
        deletion: the note of a removal that is on record.
        epitaph: there if its shim was buried.
    """

    bundle: Bundle
    record: ShimRecord | None
    deletion: dict[str, Any] | None
    epitaph: Epitaph | None


async def look_around(bundles: Bundles, journal: TaskJournal) -> list[FoundBundle]:
    """Every bundle that is there, with what its files and the journal say."""
    every = await asyncio.to_thread(_read_all, bundles)
    deleted = await journal.deleted([i for i in map(_teller, every) if i])
    return [
        replace(found, deletion={"clean": True}) if _teller(found) in deleted else found
        for found in every
    ]


def _teller(found: FoundBundle) -> str:
    """The instance whose own word says whether its task is deleted; empty: something else does."""
    is_settled = found.deletion is not None or found.epitaph is not None
    if found.record is None or found.record.binary or is_settled:
        return ""
    return found.record.instance_id


def _read_all(bundles: Bundles) -> list[FoundBundle]:
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
