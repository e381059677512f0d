"""Images of the node as users name them, read out of containerd's names and content.

Nothing is kept here but a cache of what cannot change: what a digest's manifest and configuration
say. Names are asked for each time, since other clients of containerd change them too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING

import structlog

from services.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TheseusError,
    Unavailable,
)
from services.common.frozen import frozen
from services.daemon.images import manifest
from services.daemon.images.image import Image, ImageId, ImageUser, RunImage
from services.daemon.images.progress import PullProgress
from services.daemon.images.reference import id_prefix, parse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from services.daemon.containers.runtime import Snapshots
    from services.daemon.images.image import LayerProgress
    from services.daemon.images.node import (
        Content,
        Descriptor,
        ImageNames,
        ImageTransfer,
        NamedImage,
        Platform,
        RegistryCredentials,
        TransferProgress,
    )

log = structlog.get_logger(__name__)

_UNTAGGED = "untagged"
_UNTAGGED_PREFIX = f"{_UNTAGGED}@"
_DEPTH_MAX = 4
_REPORT_INTERVAL_S = 0.1
_CACHE_MAX = 4096


@frozen
class RemovedImage:
    """What a removal took away: references, and ids of images that are gone altogether."""

    untagged: tuple[str, ...]
    deleted: tuple[str, ...]


@frozen
class _Entry:
    """An image with all names in containerd that lead to it."""

    image: Image
    names: tuple[str, ...]

    @property
    def tagged(self) -> tuple[str, ...]:
        """The names that users know; an image that was loaded without one has none."""
        return tuple(sorted(n for n in self.names if not n.startswith(_UNTAGGED_PREFIX)))


class ImageStore:
    """The images of one namespace of containerd.

    Args:
        names, content, transfer, snapshots: containerd's.
        snapshotter: into which images are unpacked.
        users: tells which containers were made from an image.
    """

    def __init__(
        self,
        *,
        names: ImageNames,
        content: Content,
        transfer: ImageTransfer,
        snapshots: Snapshots,
        snapshotter: str,
        users: Callable[[ImageId], Sequence[ImageUser]],
    ) -> None:
        self._names = names
        self._content = content
        self._transfer = transfer
        self._snapshots = snapshots
        self._snapshotter = snapshotter
        self._users = users
        self._platform = manifest.host_platform()
        self._known: dict[str, Image] = {}
        self._usage: dict[ImageId, int] = {}

    async def list_all(self) -> list[Image]:
        """All images, newest first. One whose content is damaged is left out, and logged."""
        sized = await asyncio.gather(*(self._with_usage(e) for e in await self._catalog()))
        return sorted(sized, key=lambda image: -image.created_at_ns)

    async def count(self) -> int:
        """How many images there are."""
        return len(await self._catalog())

    async def get(self, text: str) -> Image:
        """The image that a user calls so: reference, id, or unique prefix of an id.

        Raises:
            NotFound: there is none.
            InvalidArgument: it is no reference, or several ids have the prefix.
        """
        entry, _ = await self._find(text)
        return await self._with_usage(entry)

    async def for_run(self, text: str) -> RunImage:
        """What a container takes from the image that a user calls so. Raises as :meth:`get`."""
        entry, reference = await self._look_up(text)
        image = entry.image
        return RunImage(
            id=image.id,
            reference=reference,
            chain_id=image.chain_ids[-1] if image.chain_ids else "",
            config=image.config,
        )

    async def pull(
        self, text: str, platform: str = "", credentials: RegistryCredentials | None = None
    ) -> AsyncGenerator[list[LayerProgress] | Image, None]:
        """Pull an image: reports until the last item, which is the image.

        Raises:
            InvalidArgument: the reference or the platform is malformed.
            TheseusError: what containerd and the registry say.
        """
        reference = str(parse(text))
        wanted = self._parse_platform(platform)
        progress = PullProgress()
        task = asyncio.create_task(
            self._transfer.pull(
                reference,
                platform=wanted,
                snapshotter=self._snapshotter,
                progress=progress.update,
                credentials=credentials,
            ),
            name="pull",
        )
        try:
            while not task.done():
                changed = asyncio.ensure_future(progress.changed())
                await asyncio.wait([task, changed], return_when="FIRST_COMPLETED")
                changed.cancel()
                if progress.layers and not task.done():
                    yield progress.report()
                    # Not more often than anybody can see.
                    await asyncio.wait([task], timeout=_REPORT_INTERVAL_S)
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])
        if progress.layers:
            yield progress.finished()
        named = await self._names.get(reference)
        if named is None:
            raise NotFound(f"image {reference} was removed while it was pulled")
        image = await self._resolve(named.target, wanted)
        log.info("image pulled", reference=reference, image_id=image.id)
        yield await self._with_usage(_Entry(image, (reference,)))

    async def load(self, archive: AsyncIterator[bytes]) -> list[Image]:
        """Take in an archive; returns the images that it had.

        Raises:
            InvalidArgument: it is none.
            TheseusError: what containerd says.
        """
        saved: list[str] = []

        def note(report: TransferProgress) -> None:
            if report.event == "saved" and report.name:
                saved.append(report.name)

        began_at_ns = time.time_ns()
        await self._transfer.load(
            archive,
            untagged=_UNTAGGED,
            platform=self._platform,
            snapshotter=self._snapshotter,
            progress=note,
        )
        fresh = [n for n in await self._names.list_all() if n.updated_at_ns >= began_at_ns]
        loaded = {name.name for name in fresh if not saved or name.name in saved}
        entries = [e for e in await self._catalog() if loaded.intersection(e.names)]
        for entry in entries:
            # containerd gives the archive's index a name of its own, whatever is in it.
            for name in set(entry.names) - set(entry.tagged) if entry.tagged else ():
                await self._names.delete(name, collect=False)
        log.info("archive loaded", images=[entry.image.id for entry in entries])
        return [await self._with_usage(entry) for entry in entries]

    async def remove(self, text: str, *, force: bool = False) -> RemovedImage:
        """Remove a reference, and the image when it was the last one.

        Raises:
            NotFound: there is no such image.
            FailedPrecondition: a container was made from it, or an id stands for several
                references, and it is not forced; or a container runs, forced or not.
        """
        entry, reference = await self._find(text)
        image = entry.image
        doomed = (reference,) if reference else entry.names
        last = set(doomed) >= set(entry.tagged)
        if last:
            doomed = entry.names
        if not reference and len(entry.tagged) > 1 and not force:
            raise FailedPrecondition(
                f"conflict: unable to delete {_short(image.id)} (must be forced) - image is "
                "referenced in multiple repositories",
                resource=("image", image.id),
            )
        if last:
            self._check_unused(image, text, force=force)
        for number, name in enumerate(doomed):
            await self._names.delete(name, collect=last and number == len(doomed) - 1)
        if last:
            self._known = {key: i for key, i in self._known.items() if i.id != image.id}
            self._usage.pop(image.id, None)
        log.info("image removed", references=doomed, image_id=image.id, last=last)
        untagged = tuple(name for name in doomed if name in entry.tagged)
        return RemovedImage(untagged, (image.id,) if last else ())

    def _check_unused(self, image: Image, text: str, *, force: bool) -> None:
        for user in self._users(image.id):
            if force and not user.running:
                continue
            container = user.container_id[:12]
            hint = "cannot be forced" if user.running else "must be forced"
            what = "running container" if user.running else "stopped container"
            raise FailedPrecondition(
                f"conflict: unable to remove image '{text}' ({hint}) - {what} {container} is "
                f"using its referenced image {_short(image.id)}",
                resource=("image", image.id),
            )

    async def _find(self, text: str) -> tuple[_Entry, str]:
        """As :meth:`_look_up`, with all names of the image."""
        entry, reference = await self._look_up(text)
        if not reference:
            return entry, ""
        catalog = await self._catalog()
        together = (found for found in catalog if found.image.id == entry.image.id)
        return next(together, entry), reference

    async def _look_up(self, text: str) -> tuple[_Entry, str]:
        """The image, and the reference under which it was found (empty: by its id)."""
        if not text:
            raise InvalidArgument("an image's reference or id is needed, none was given")
        prefix = id_prefix(text)
        whole_id = len(prefix) == 64
        if not whole_id and not text.startswith("sha256:"):
            named = await self._named(text)
            if named is not None:
                image = await self._resolve(named.target)
                return _Entry(image, (named.name,)), named.name
        if prefix:
            catalog = await self._catalog()
            found = [e for e in catalog if e.image.id.partition(":")[2].startswith(prefix)]
            if len(found) > 1:
                raise InvalidArgument(
                    f"several images have ids that begin with {prefix}: give more digits"
                )
            if found:
                return found[0], ""
        raise NotFound(f"No such image: {_familiar(text)}", resource=("image", text))

    async def _named(self, text: str) -> NamedImage | None:
        try:
            reference = parse(text)
        except InvalidArgument:
            if id_prefix(text):
                return None
            raise
        found = await self._names.get(str(reference))
        if found is None and reference.digest:
            return await self._by_digest(reference.name, reference.digest)
        return found

    async def _by_digest(self, name: str, digest: str) -> NamedImage | None:
        """A name of the same repository that points to a digest."""
        for named in await self._names.list_all():
            at = named.name.partition("@")[0]
            repository = at[: at.rindex(":")] if ":" in at.rpartition("/")[2] else at
            if named.target.digest == digest and repository == name:
                return named
        return None

    async def _catalog(self) -> list[_Entry]:
        """All images, each once with all of its names."""
        entries: dict[ImageId, _Entry] = {}
        for named in await self._names.list_all():
            try:
                image = await self._resolve(named.target)
            except TheseusError as error:
                if isinstance(error, Unavailable):
                    raise
                log.warning("image cannot be read", reference=named.name, error=error.message)
                continue
            names = entries[image.id].names if image.id in entries else ()
            entries[image.id] = _Entry(image, (*names, named.name))
        return list(entries.values())

    async def _resolve(self, target: Descriptor, wanted: Platform | None = None) -> Image:
        """Read what a name points to; for ``wanted``, or what fits this machine and is here."""
        key = f"{target.digest} {wanted or ''}"
        known = self._known.get(key)
        if known is None:
            known = await self._read(target, wanted)
            if len(self._known) >= _CACHE_MAX:
                self._known.clear()
            self._known[key] = known
        return known

    async def _read(self, target: Descriptor, wanted: Platform | None) -> Image:
        chosen = await self._manifest(target, wanted, depth=0)
        raw_config = await self._content.read(
            chosen.config.digest, limit_bytes=manifest.DOCUMENT_MAX_BYTES
        )
        config = manifest.parse_config(raw_config, f"configuration {chosen.config.digest}")
        return Image(
            id=ImageId(chosen.config.digest),
            references=(),
            digest=target.digest,
            size_bytes=chosen.config.size_bytes + sum(layer.size_bytes for layer in chosen.layers),
            created_at_ns=config.created_at_ns,
            platform=str(config.platform),
            raw_config=raw_config,
            config=config.run,
            chain_ids=manifest.chain_ids(config.diff_ids),
        )

    async def _manifest(
        self, target: Descriptor, wanted: Platform | None, *, depth: int
    ) -> manifest.Manifest:
        what = f"manifest {target.digest}"
        data = await self._content.read(target.digest, limit_bytes=manifest.DOCUMENT_MAX_BYTES)
        document = manifest.parse_document(data, what)
        media_type = str(document.get("mediaType") or target.media_type)
        if media_type not in manifest.INDEX_TYPES and "manifests" not in document:
            return manifest.parse_manifest(document, what)
        if depth >= _DEPTH_MAX:
            raise DataLoss(f"{what} is nested more than {_DEPTH_MAX} deep")
        fitting = manifest.choose(document, wanted or self._platform, what)
        if wanted is None:  # something for another machine was asked for, and is all that is here
            fitting += [entry for entry in manifest.entries(document, what) if entry not in fitting]
        for entry in fitting:
            try:
                return await self._manifest(entry, wanted, depth=depth + 1)
            except NotFound:
                continue
        raise NotFound(
            f"no match for platform {wanted or self._platform} in {what}",
            resource=("manifest", target.digest),
        )

    async def _with_usage(self, entry: _Entry) -> Image:
        image = dataclasses.replace(entry.image, references=entry.tagged)
        if image.id not in self._usage:
            sizes = await asyncio.gather(*(self._snapshots.usage(key) for key in image.chain_ids))
            if not all(sizes):  # not unpacked, or not yet: ask again next time
                return dataclasses.replace(image, unpacked_bytes=sum(sizes))
            self._usage[image.id] = sum(sizes)
        return dataclasses.replace(image, unpacked_bytes=self._usage[image.id])

    def _parse_platform(self, text: str) -> Platform:
        platform = manifest.parse_platform(text) if text else self._platform
        if platform is None:
            raise InvalidArgument(
                f"platform '{text}' is not of the form os/architecture[/variant]", field="platform"
            )
        return platform


def _short(image_id: ImageId) -> str:
    return image_id.partition(":")[2][:12]


def _familiar(text: str) -> str:
    """As docker says it: a name always with its tag."""
    try:
        return parse(text).familiar
    except InvalidArgument:
        return text
