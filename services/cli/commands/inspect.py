"""``inspect``."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

from protos.theseus.engine.v1 import containers_pb2, images_pb2
from services.cli import describe
from services.cli.commands import Command
from services.cli.failure import report
from services.cli.parser import UsageError
from services.common.errors import NotFound, TheseusError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from services.cli.engine import Engine
    from services.cli.parser import Parser

_KINDS = ("container", "image")
_PLACE = re.compile(r"\{\{\s*(json\s+)?((?:\.\w+)+|\.)\s*\}\}")


def _arguments(parser: Parser) -> None:
    parser.add_argument("--type", choices=_KINDS, default="", help="container or image")
    parser.option(
        "-f",
        "--format",
        metavar="TEMPLATE",
        help="text in which {{.Key.Key}} and {{json .Key}} are replaced",
    )
    parser.words("names", at_least=1)


async def _inspect(engine: Engine, options: Namespace) -> int:
    render = _template(options.format) if options.format else None
    found, code = [], 0
    for name in options.names:
        try:
            found.append(await _find(engine, name, options.type))
        except TheseusError as error:
            report(error)
            code = 1
    if render is None:
        sys.stdout.write(json.dumps(found, indent=4) + "\n")
    else:
        sys.stdout.writelines(f"{render(thing)}\n" for thing in found)
    return code


async def _find(engine: Engine, name: str, kind: str) -> dict[str, Any]:
    try:
        if kind != "image":
            request = containers_pb2.GetContainerRequest(container=name)
            answer = await engine.call(engine.containers.Get, request)
            return describe.container(answer.container)
    except NotFound:
        if kind:
            raise
    try:
        wanted = images_pb2.GetImageRequest(image=name)
        return describe.image((await engine.call(engine.images.Get, wanted)).image)
    except TheseusError as error:
        if kind:
            raise
        raise type(error)(
            f"'{name}' is neither a container nor an image: {error.message}"
        ) from None


def _template(text: str) -> Callable[[dict[str, Any]], str]:
    """What a template makes of a thing; of Go's templates only paths and ``json`` are known."""
    if "{{" in _PLACE.sub("", text):
        raise UsageError(f"'{text}' is not understood: write {{{{.Key.Key}}}} or {{{{json .Key}}}}")

    def render(thing: dict[str, Any]) -> str:
        def replace(match: re.Match[str]) -> str:
            value: Any = thing
            for key in match[2].split(".")[1:]:
                if key and (not isinstance(value, dict) or key not in value):
                    raise UsageError(f"there is no {match[2]}: see inspect without --format")
                value = value[key] if key else value
            return _text(value, as_json=bool(match[1]))

        return _PLACE.sub(replace, text)

    return render


def _text(value: Any, *, as_json: bool) -> str:
    if as_json or isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "<no value>" if value is None else str(value)


COMMANDS = {"inspect": Command(_arguments, _inspect)}
