"""The command line by which containerd runs a shim: flags as Go's ``flag`` package takes them.

No argparse: its import takes longer than all the work that there is to do.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_SWITCHES = frozenset({"debug", "v", "version", "info", "h", "help"})
_VALUES = frozenset(
    {"namespace", "id", "address", "publish-binary", "bundle", "socket", "debug-socket"}
)
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})

USAGE = """\
usage: containerd-shim-theseus-v1 -namespace NAME -id ID -address SOCKET [FLAG ...] start | delete
       containerd-shim-theseus-v1 -v | -info

containerd runs this program for the runtime io.containerd.theseus.v1; it is not run by hand.

  -namespace NAME         namespace that owns the shim
  -id ID                  id of the task
  -address SOCKET         containerd's gRPC socket
  -publish-binary PATH    ignored: events go to $TTRPC_ADDRESS
  -bundle DIRECTORY       the bundle, if not the working directory
  -debug                  log more
  -v                      print the version
  -info                   read an options protobuf, print a RuntimeInfo protobuf
"""


class UsageError(Exception):
    """The command line cannot be understood."""


class Flags:
    """What the command line says; a plain class, since dataclasses are slow to import."""

    __slots__ = ("action", "address", "bundle", "debug", "help", "id", "info", "namespace", "v")

    def __init__(self, arguments: Sequence[str]) -> None:
        """Parse ``arguments``, the program's name left out.

        Raises:
            UsageError: a flag is not known, or lacks its value.
        """
        values, self.action = _parse(arguments)
        self.namespace = values.get("namespace", "")
        self.id = values.get("id", "")
        self.address = values.get("address", "")
        self.bundle = values.get("bundle", "")
        self.debug = values.get("debug", "") in _TRUE
        self.info = values.get("info", "") in _TRUE
        self.v = _TRUE.intersection((values.get("v", ""), values.get("version", ""))) != frozenset()
        self.help = _TRUE.intersection((values.get("h", ""), values.get("help", ""))) != frozenset()


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], str]:
    """Flags up to the first word that is none, which is the action; what follows it is ignored."""
    values: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            return values, word
        if word == "--":
            return values, rest[0] if rest else ""
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if name in _SWITCHES:
            values[name] = value if equals else "true"
        elif name not in _VALUES:
            raise UsageError(f"flag provided but not defined: -{name}")
        elif equals:
            values[name] = value
        elif rest:
            values[name] = rest.pop(0)
        else:
            raise UsageError(f"flag needs an argument: -{name}")
    return values, ""
