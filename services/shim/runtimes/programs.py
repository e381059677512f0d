"""Where the programs of runtimes are: by name in PATH, by path, or as the administrator says.

    /etc/theseus/runtimes.json
    {"youki": {"path": "/opt/youki/bin/youki", "arguments": ["--log-level", "error"],
               "lacks": ["pause", "no-new-keyring"]}}

The file is read when a name is looked for: a runtime that is installed while shims run can be used
at once. ``THESEUS_RUNTIMES`` names another file. Nothing here imports asyncio, for the sake of
``theseus-shim probe``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from services.common import small_files
from services.common.errors import InvalidArgument
from services.common.frozen import frozen
from services.shim.runtimes.runtime import RuntimeMissing

if TYPE_CHECKING:
    from collections.abc import Iterable

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    # Messages are matched, so they must not be translated.
    "LC_ALL": "C",
}
"""All of the environment that a runtime's program gets."""

CAPABILITIES = frozenset(
    {
        "exec",
        "pause",
        "update",
        "kill-all",
        "checkpoint",
        "systemd-cgroup",
        "no-pivot",
        "no-new-keyring",
    }
)
"""What a runtime with runc's command line may lack."""

_CONFIGURATION = "/etc/theseus/runtimes.json"
_CONFIGURATION_VARIABLE = "THESEUS_RUNTIMES"
_CONFIGURATION_MAX_BYTES = 1 << 20
_BINARY_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,128}")


@frozen
class Program:
    """A runtime's program.

    Attributes:
        path: absolute.
        arguments: go before all others.
        lacks: what it cannot do, of CAPABILITIES.
    """

    path: str
    arguments: tuple[str, ...] = ()
    lacks: frozenset[str] = frozenset()


def find(binary: str) -> Program:
    """The program of a runtime.

    Raises:
        InvalidArgument: the name is neither a plain name nor an absolute path, or its configuration
            is wrong.
        RuntimeMissing: there is no such program.
    """
    if binary.startswith("/"):
        return Program(binary)
    if not _BINARY_NAME.fullmatch(binary):
        raise InvalidArgument(
            f"runtime '{binary}' is neither a program's name nor an absolute path", field="options"
        )
    entry = configured().get(binary)
    if entry is not None:
        return entry
    found = shutil.which(binary, path=ENVIRONMENT["PATH"])
    if found is None:
        raise RuntimeMissing(
            f"runtime '{binary}' is not installed (looked in {ENVIRONMENT['PATH']}): install it, "
            "or choose another"
        )
    return Program(found)


def find_program(binary: str) -> str:
    """Path of a runtime's program; raises as :func:`find`."""
    return find(binary).path


def identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a program from another one in its place, or from itself before a change."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def installed(binaries: Iterable[str]) -> list[str]:
    """Paths of the programs of those runtimes that are there."""
    paths = []
    for binary in binaries:
        with suppress(RuntimeMissing, InvalidArgument):
            paths.append(find(binary).path)
    return paths


def configured() -> dict[str, Program]:
    """The runtimes of the configuration file, by name; none when there is no file.

    Raises:
        InvalidArgument: the file is not as it should be.
    """
    path = os.environ.get(_CONFIGURATION_VARIABLE) or _CONFIGURATION
    try:
        data = small_files.read(path, _CONFIGURATION_MAX_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    try:
        entries = json.loads(data)
    except ValueError as error:
        raise InvalidArgument(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InvalidArgument(f"{path} is not a JSON object of runtimes by name")
    return {name: _entry(path, name, entry) for name, entry in entries.items()}


def _entry(path: str, name: str, entry: Any) -> Program:
    what = f"runtime '{name}' in {path}"
    if not _BINARY_NAME.fullmatch(name) or not isinstance(entry, dict):
        raise InvalidArgument(f"{what} is not a plain name with an object")
    program = entry.get("path")
    if not isinstance(program, str) or not program.startswith("/"):
        raise InvalidArgument(f"{what} has no absolute path")
    arguments, lacks = entry.get("arguments", []), entry.get("lacks", [])
    for words in (arguments, lacks):
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InvalidArgument(f"{what}: arguments and lacks are lists of strings")
    if unknown := set(entry) - {"path", "arguments", "lacks"} | (set(lacks) - CAPABILITIES):
        raise InvalidArgument(
            f"{what} has unknown words: {', '.join(sorted(unknown))}; it may lack "
            f"{', '.join(sorted(CAPABILITIES))}"
        )
    return Program(program, tuple(arguments), frozenset(lacks))
