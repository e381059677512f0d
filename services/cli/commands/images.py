"""``pull``, ``images``, ``load`` and ``rmi``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from protos.theseus.engine.v1 import images_pb2 as pb
from services.cli import progress, table, terminal
from services.cli.commands import Command
from services.cli.commands.lifecycle import for_each
from services.cli.engine import LONG_DEADLINE_S
from services.cli.names import familiar, split
from services.cli.parser import UsageError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import AsyncIterator, Iterator

    from services.cli.engine import Engine
    from services.cli.parser import Parser

_NONE = "<none>"
_PIECE_BYTES = 1 << 20


def _pull_arguments(parser: Parser) -> None:
    parser.option("--platform", metavar="OS/ARCH[/VARIANT]", help="which one of an index")
    parser.flag("-q", "--quiet", help="print only the reference")
    parser.words("references", at_least=1, at_most=1)


async def _pull(engine: Engine, options: Namespace) -> int:
    reference = options.references[0]
    await progress.pull(engine, reference, platform=options.platform, quiet=options.quiet)
    sys.stdout.write(f"{reference}\n")
    return 0


def _images_arguments(parser: Parser) -> None:
    parser.flag("-a", "--all", help="accepted for docker's sake: all are shown anyway")
    parser.flag("-q", "--quiet", help="only the ids")
    parser.flag("--no-trunc", help="do not shorten anything")
    parser.flag("--digests", help="print digests too")
    parser.words("repositories", at_most=1)


async def _images(engine: Engine, options: Namespace) -> int:
    images = (await engine.call(engine.images.List, pb.ListImagesRequest())).images
    wanted = options.repositories[0] if options.repositories else ""
    rows = [
        (repository, tag, digest, image)
        for image in images
        for repository, tag, digest in _names(image)
        if wanted in ("", repository, f"{repository}:{tag}")
    ]
    if options.quiet:
        identities = (_identity(image, whole=options.no_trunc) for *_, image in rows)
        sys.stdout.writelines(f"{identity}\n" for identity in dict.fromkeys(identities))
        return 0
    headings = ["REPOSITORY", "TAG", "DIGEST", "IMAGE ID", "CREATED", "SIZE"]
    cells = [
        [
            repository,
            tag,
            digest,
            _identity(image, whole=options.no_trunc),
            table.ago(image.created_at),
            table.size(image.unpacked_bytes or image.size_bytes),
        ]
        for repository, tag, digest, image in rows
    ]
    if not options.digests:
        for line in [headings, *cells]:
            del line[2]
    table.write(headings, cells)
    return 0


def _names(image: pb.Image) -> Iterator[tuple[str, str, str]]:
    """Repository, tag and digest of each line that stands for an image."""
    if not image.references:
        yield _NONE, _NONE, image.digest or _NONE
    for reference in image.references:
        repository, tag, digest = split(familiar(reference))
        yield repository, tag or _NONE, digest or image.digest


def _identity(image: pb.Image, *, whole: bool) -> str:
    return image.id if whole else table.short(image.id)


def _load_arguments(parser: Parser) -> None:
    parser.option("-i", "--input", metavar="FILE", help="the archive; standard input if not given")
    parser.flag("-q", "--quiet", help="print nothing")
    parser.words("nothing", at_most=0)


async def _load(engine: Engine, options: Namespace) -> int:
    if not options.input and terminal.is_terminal(0):
        raise UsageError("an archive is read from a file or a pipe: name one with --input")
    try:
        archive = Path(options.input).open("rb") if options.input else sys.stdin.buffer  # noqa: SIM115 ASYNC230 - quick
    except OSError as error:
        raise UsageError(f"archive cannot be read: {error}") from None
    with archive, engine.failures():
        answer = await engine.images.Load(_pieces(archive), timeout=LONG_DEADLINE_S)
    for image in answer.images if not options.quiet else ():
        for reference in image.references:
            sys.stdout.write(f"Loaded image: {familiar(reference)}\n")
        if not image.references:
            sys.stdout.write(f"Loaded image ID: {image.id}\n")
    return 0


async def _pieces(archive: BinaryIO) -> AsyncIterator[pb.LoadImageRequest]:
    while data := await asyncio.to_thread(archive.read, _PIECE_BYTES):
        yield pb.LoadImageRequest(data=data)


def _rmi_arguments(parser: Parser) -> None:
    parser.flag("-f", "--force", help="although a container uses it")
    parser.words("images", at_least=1)


async def _rmi(engine: Engine, options: Namespace) -> int:
    async def remove(image: str) -> None:
        request = pb.RemoveImageRequest(image=image, force=options.force)
        answer = await engine.call(engine.images.Remove, request)
        sys.stdout.writelines(f"Untagged: {familiar(name)}\n" for name in answer.untagged)
        sys.stdout.writelines(f"Deleted: {identity}\n" for identity in answer.deleted)

    return await for_each(options.images, remove)


COMMANDS = {
    "pull": Command(_pull_arguments, _pull),
    "images": Command(_images_arguments, _images),
    "load": Command(_load_arguments, _load),
    "rmi": Command(_rmi_arguments, _rmi),
}
