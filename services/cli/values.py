"""What option values mean: sizes, processors, durations, ports, volumes, environment files."""

from __future__ import annotations

import os
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING

from protos.theseus.engine.v1 import containers_pb2 as pb
from services.cli.parser import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)i?b?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)", re.ASCII)
_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_PORT = re.compile(
    r"(?:(?P<ip>\[[^]]*\]|[^:/]*):)??(?:(?P<host>\d*(?:-\d+)?):)?"
    r"(?P<container>\d+(?:-\d+)?)(?:/(?P<protocol>\w+))?",
    re.ASCII,
)
_PORT_MAX = 65535


def size(text: str) -> int:
    """Bytes of ``64m``, ``1g``, ``1024``; units are powers of 1024; -1 stands for no limit."""
    if text == "-1":
        return 0
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"'{text}' is not a size: write a number with b, k, m or g, such as 64m")
    return int(Decimal(match[1]) * (1 << _UNITS[match[2].lower()]))


def nano_cpus(text: str) -> int:
    """10^-9 processors of a decimal number."""
    try:
        return int(Decimal(text) * 10**9)
    except (InvalidOperation, ValueError, OverflowError):
        raise UsageError(f"'{text}' is not a number of processors: write one such as 0.5") from None


def number(text: str, what: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"'{text}' is not a number for {what}") from None


def seconds(text: str) -> Decimal:
    """A duration: a number of seconds, or a sequence such as ``1h30m``, ``10s``, ``500ms``."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return Decimal(text)
    if not re.fullmatch(f"(?:{_DURATION.pattern})+", text, re.ASCII):
        raise UsageError(f"'{text}' is not a duration: write one such as 90s or 1h30m")
    return sum((Decimal(n) * _SECONDS[unit] for n, unit in _DURATION.findall(text)), Decimal(0))


def ports(text: str) -> list[pb.PortMapping]:
    """Mappings of ``[[IP:][HOST[-HOST]]:]CONTAINER[-CONTAINER][/PROTOCOL]``."""
    match = _PORT.fullmatch(text)
    if match is None:
        raise UsageError(
            f"'{text}' is not a port: write [[IP:]HOST_PORT:]CONTAINER_PORT[/PROTOCOL]"
        )
    inside = _range(match["container"], text)
    outside = _range(match["host"], text) if match["host"] else [0] * len(inside)
    if len(inside) != len(outside):
        raise UsageError(f"port ranges of '{text}' differ in length")
    return [
        pb.PortMapping(
            host_ip=(match["ip"] or "").strip("[]"),
            host_port=host_port,
            container_port=container_port,
            protocol=(match["protocol"] or "").lower(),
        )
        for host_port, container_port in zip(outside, inside, strict=True)
    ]


def volume(text: str) -> pb.Mount:
    """The mount of ``[SOURCE:]TARGET[:OPTION,...]``: a source with a slash is a path."""
    source, target, options = "", text, ""
    match text.split(":"):
        case [source, target, options]:
            pass
        case [source, target]:
            pass
        case [target]:
            pass
        case _:
            raise UsageError(f"'{text}' is not a volume: write [SOURCE:]TARGET[:ro]")
    mount = pb.Mount(target=target)
    given = [option for option in options.split(",") if option]
    mount.read_only = "ro" in given
    # SELinux labels and copying mean nothing here; what is left is the engine's to judge.
    mount.options.extend(o for o in given if o not in ("ro", "rw", "z", "Z", "nocopy"))
    if source.startswith(("/", ".", "~")):
        mount.type = pb.Mount.TYPE_BIND
        mount.source = str(Path(os.path.abspath(Path(source).expanduser())))  # noqa: PTH100
        mount.create_source = True
    else:
        mount.type = pb.Mount.TYPE_VOLUME
        mount.source = source
    return mount


_MOUNT_TYPES = {
    "bind": pb.Mount.TYPE_BIND,
    "volume": pb.Mount.TYPE_VOLUME,
    "tmpfs": pb.Mount.TYPE_TMPFS,
}
_MOUNT_FIELDS = {"source": "source", "src": "source"} | dict.fromkeys(
    ("target", "dst", "destination"), "target"
)


def mount(text: str) -> pb.Mount:
    """The mount of ``type=bind,source=/a,target=/b,readonly``."""
    result = pb.Mount(type=pb.Mount.TYPE_VOLUME)
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key == "type" and value in _MOUNT_TYPES:
            result.type = _MOUNT_TYPES[value]
        elif key in _MOUNT_FIELDS:
            setattr(result, _MOUNT_FIELDS[key], value)
        elif key in ("readonly", "ro") and (not equals or value in ("true", "1", "false", "0")):
            result.read_only = value not in ("false", "0")
        elif key == "bind-propagation" and value:
            result.options.append(value)
        elif key in ("tmpfs-size", "tmpfs-mode") and value:
            result.options.append(f"{key.removeprefix('tmpfs-')}={value}")
        else:
            raise UsageError(f"'{part}' means nothing in --mount '{text}'")
    if not result.target:
        raise UsageError(f"--mount '{text}' has no target")
    return result


def tmpfs(text: str) -> pb.Mount:
    """The mount of ``TARGET[:OPTION,...]``."""
    target, _, options = text.partition(":")
    given = [option for option in options.split(",") if option]
    return pb.Mount(
        type=pb.Mount.TYPE_TMPFS,
        target=target,
        read_only="ro" in given,
        options=[option for option in given if option not in ("ro", "rw")],
    )


def environment(pairs: Iterable[str], files: Iterable[str]) -> list[str]:
    """Variables of files, then single ones; a name alone takes our own value, where there is one.

    A name alone that we have no value for removes the image's variable, from the command line; in a
    file it means nothing, as docker has it.
    """
    result = []
    for path in files:
        for line in _lines(path):
            name, equals, _ = line.partition("=")
            if not name or re.search(r"\s", name):
                raise UsageError(f"'{line}' in {path} is not a variable: write NAME=VALUE")
            if equals:
                result.append(line)
            elif name in os.environ:
                result.append(f"{name}={os.environ[name]}")
    for pair in pairs:
        if not pair or pair.startswith("="):
            raise UsageError(f"'{pair}' is not a variable: write NAME=VALUE")
        has_value = "=" in pair or pair not in os.environ
        result.append(pair if has_value else f"{pair}={os.environ[pair]}")
    return result


def labels(pairs: Iterable[str]) -> dict[str, str]:
    """Labels of ``KEY[=VALUE]``."""
    result = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not key:
            raise UsageError(f"'{pair}' is not a label: write KEY=VALUE")
        result[key] = value
    return result


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"environment file {path} cannot be read: {error}") from None
    lines = (line.lstrip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _range(text: str, whole: str) -> list[int]:
    first, _, last = text.partition("-")
    if not first:
        raise UsageError(f"'{whole}' is not a port: a range begins with a number")
    begin, end = int(first), int(last or first)
    if not 0 <= begin <= end <= _PORT_MAX:
        raise UsageError(f"'{whole}' is not a port: numbers go from 1 to {_PORT_MAX}, upwards")
    return list(range(begin, end + 1))
