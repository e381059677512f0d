"""Where a process' streams come from and go to: the URIs of Create and Exec, parsed.

(empty), /dev/null            nothing
/absolute/path                a FIFO as containerd's clients make; a plain file is appended to
file:///path                  appended to as it comes
binary:///path?key=value      a logger program, given the pipes as descriptors 3 and 4
theseus-log:///path?...       our log file, written by the shim, which also serves Streams.Attach
                              format=json-file|cri  max-size=BYTES  max-file=N
                              on-full=drop|block
theseus-stream:               no file: a bounded buffer for Streams.Attach; also for stdin
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from services.common.errors import InvalidArgument
from services.common.frozen import frozen

LOG_SCHEME = "theseus-log"
STREAM_SCHEME = "theseus-stream"
FORMATS = ("json-file", "cri")
"""Of log files; the first is taken when none is named."""


@frozen
class Stdio:
    """The streams of a process as the caller named them."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


@frozen
class Nothing:
    """/dev/null."""


@frozen
class Fifo:
    """A FIFO, or whatever lies at ``path``."""

    path: Path


@frozen
class RawFile:
    """A file that the bytes are appended to."""

    path: Path


@frozen
class Logger:
    """A program that reads the pipes."""

    path: Path
    arguments: tuple[str, ...] = ()


@frozen
class LogFile:
    """A log file of our own.

    Attributes:
        path: of the newest file; older ones have ``.1``, ``.2`` and so on appended.
        max_size_bytes: size at which a new file begins; 0: never.
        max_files: files kept, the newest included.
        block_on_full: let the process wait when the disk is full, instead of dropping lines.
        format: one of FORMATS.
    """

    path: Path
    max_size_bytes: int = 0
    max_files: int = 1
    block_on_full: bool = False
    format: str = FORMATS[0]


@frozen
class Attachable:
    """Only what attached clients read or write."""


Output = Nothing | Fifo | RawFile | Logger | LogFile | Attachable
Input = Nothing | Fifo | Attachable


def parse_input(uri: str) -> Input:
    """Where standard input comes from.

    Raises:
        InvalidArgument: the URI is none that can be read from.
    """
    parsed = _parse(uri, field="stdin")
    if isinstance(parsed, (Nothing, Fifo, Attachable)):
        return parsed
    raise InvalidArgument(f"stdin cannot come from '{uri}'", field="stdin")


def parse_output(uri: str, *, field: str) -> Output:
    """Where an output stream goes; ``field`` names it in errors.

    Raises:
        InvalidArgument: the URI is malformed, or of a scheme that is not known.
    """
    return _parse(uri, field=field)


def _parse(uri: str, *, field: str) -> Output:
    if "\0" in uri:
        raise InvalidArgument(f"{field} URI holds a NUL", field=field)
    if uri in ("", "/dev/null"):
        return Nothing()
    if uri.startswith("/"):
        return Fifo(Path(uri))
    parts = urlsplit(uri)
    if parts.scheme == STREAM_SCHEME:
        return Attachable()
    path = unquote(parts.path)
    if parts.scheme not in ("file", "binary", LOG_SCHEME):
        raise InvalidArgument(f"{field} URI '{uri}' has an unknown scheme", field=field)
    if parts.netloc or not path.startswith("/"):
        raise InvalidArgument(f"{field} URI '{uri}' names no absolute path", field=field)
    if parts.scheme == "file":
        return RawFile(Path(path))
    query = parse_qsl(parts.query, keep_blank_values=True)
    if parts.scheme == "binary":
        # As upstream: each key is an argument, followed by its value.
        return Logger(Path(path), tuple(word for pair in query for word in pair if word))
    return _log_file(Path(path), dict(query), uri=uri, field=field)


def _log_file(path: Path, query: dict[str, str], *, uri: str, field: str) -> LogFile:
    unknown = set(query) - {"format", "max-size", "max-file", "on-full"}
    form = query.get("format", FORMATS[0])
    if unknown or form not in FORMATS:
        raise InvalidArgument(
            f"{field} URI '{uri}' has unknown parameters or an unknown format: max-size, max-file, "
            f"on-full and format are known, which is one of {', '.join(FORMATS)}",
            field=field,
        )
    on_full = query.get("on-full", "drop")
    if on_full not in ("drop", "block"):
        raise InvalidArgument(f"{field} URI '{uri}': on-full is drop or block", field=field)
    return LogFile(
        path,
        format=form,
        max_size_bytes=_number(query, "max-size", 0, uri=uri, field=field),
        max_files=max(1, _number(query, "max-file", 1, uri=uri, field=field)),
        block_on_full=on_full == "block",
    )


def _number(query: dict[str, str], key: str, default: int, *, uri: str, field: str) -> int:
    text = query.get(key, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidArgument(f"{field} URI '{uri}': {key} is not a number", field=field)
    return int(text)
