"""What a shim is told at its birth: by flags, environment and standard input, as containerd does.

Three generations of containerd ask in three ways, and want their answers likewise:

    1.6           flags, $TTRPC_ADDRESS                    the address as it is
    1.7 to 2.2    likewise, $MAX_SHIM_VERSION              JSON
    2.3           likewise, and BootstrapParams on stdin   BootstrapResult

Before 2.3 standard input holds the runtime options, an ``Any``, or nothing.
"""

from __future__ import annotations

from services.shim.ttrpc import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.shim.ttrpc.flags import Flags

PLAIN, JSON, BOOTSTRAP = "plain", "json", "bootstrap"
INPUT_MAX_BYTES = 1 << 20

_OPTIONS_TYPE = b"containerd.runc.v1.Options"
# Field numbers: containerd.runtime.bootstrap.v1.BootstrapParams and Extension, google.protobuf.Any,
# containerd.runc.v1.Options.
_PARAMS_ID, _PARAMS_NAMESPACE, _PARAMS_LOG_LEVEL = 1, 2, 3
_PARAMS_TTRPC_ADDRESS, _PARAMS_EXTENSION, _PARAMS_SOCKET_DIRECTORY = 5, 8, 9
_EXTENSION_VALUE, _ANY_TYPE, _ANY_VALUE, _OPTIONS_SHIM_CGROUP = 1, 1, 2, 3
_LOG_LEVEL_DEBUG = -4
_INT64_SIGN = 1 << 63

_Fields = list[tuple[int, int | bytes]]


class StartRequest:
    """The settings of one shim; a plain class, since dataclasses are slow to import.

    Attributes:
        namespace: containerd's namespace.
        id: of the container that it is started for.
        bundle: absolute path of that container's bundle, the shim's home.
        address: containerd's gRPC socket.
        ttrpc_address: containerd's ttrpc socket, where events go.
        log_level: info or debug.
        answer: PLAIN, JSON or BOOTSTRAP.
        socket_directory: where to make the socket; empty: beside containerd's.
        shim_cgroup: cgroup that the shim is to enter, below each hierarchy; empty: none.
        oom_score_adj: for the shim's process.
    """

    __slots__ = (
        "address",
        "answer",
        "bundle",
        "id",
        "log_level",
        "namespace",
        "oom_score_adj",
        "shim_cgroup",
        "socket_directory",
        "ttrpc_address",
    )

    def __init__(self) -> None:
        self.namespace = self.id = self.bundle = self.address = self.ttrpc_address = ""
        self.socket_directory = self.shim_cgroup = ""
        self.log_level, self.answer = "info", PLAIN
        self.oom_score_adj = "0"

    def to_bytes(self) -> bytes:
        """All of it in one message, for :meth:`from_bytes`."""
        return wire.encode(
            (number, str(getattr(self, name)).encode())
            for number, name in enumerate(self.__slots__, start=1)
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> StartRequest:
        """What :meth:`to_bytes` made.

        Raises:
            ValueError: it did not.
        """
        request = cls()
        for number, value in wire.decode(data):
            if not isinstance(value, bytes) or number > len(cls.__slots__):
                raise ValueError("not a start request")
            setattr(request, cls.__slots__[number - 1], value.decode())
        return request


def parse_request(
    flags: Flags, *, bundle: str, given: bytes, environment: Mapping[str, str]
) -> StartRequest:
    """Put together what containerd says.

    Args:
        flags: the command line.
        bundle: the working directory.
        given: standard input.
        environment: all of it.
    """
    request = StartRequest()
    request.namespace, request.id, request.bundle = flags.namespace, flags.id, bundle
    request.address = _path(flags.address or environment.get("GRPC_ADDRESS", ""))
    request.ttrpc_address = _path(environment.get("TTRPC_ADDRESS", ""))
    request.log_level = "debug" if flags.debug else "info"
    if "MAX_SHIM_VERSION" in environment:
        request.answer = JSON
    try:
        fields = wire.decode(given)
    except ValueError:
        fields = []  # something of a later version; nothing in it is needed
    if _is_bootstrap(fields, flags):
        _read_bootstrap(request, fields)
    else:
        request.shim_cgroup = _shim_cgroup(fields)
    request.ttrpc_address = request.ttrpc_address or f"{request.address}.ttrpc"
    return request


def _is_bootstrap(fields: _Fields, flags: Flags) -> bool:
    """Whether it is BootstrapParams: options can be read as such, but name no task of ours."""
    values = dict(fields)
    return (
        values.get(_PARAMS_ID) == flags.id.encode()
        and values.get(_PARAMS_NAMESPACE) == flags.namespace.encode()
    )


def _read_bootstrap(request: StartRequest, fields: _Fields) -> None:
    values = dict(fields)
    request.answer = BOOTSTRAP
    request.socket_directory = _text(values.get(_PARAMS_SOCKET_DIRECTORY))
    request.ttrpc_address = _path(_text(values.get(_PARAMS_TTRPC_ADDRESS))) or request.ttrpc_address
    level = values.get(_PARAMS_LOG_LEVEL, 0)
    # A negative enum value travels as a 64-bit two's complement.
    if (
        isinstance(level, int)
        and level >= _INT64_SIGN
        and level - 2 * _INT64_SIGN <= (_LOG_LEVEL_DEBUG)
    ):
        request.log_level = "debug"
    for number, extension in fields:
        if number == _PARAMS_EXTENSION and isinstance(extension, bytes):
            packed = dict(_decode(extension)).get(_EXTENSION_VALUE)
            if isinstance(packed, bytes):
                request.shim_cgroup = request.shim_cgroup or _shim_cgroup(_decode(packed))


def _shim_cgroup(packed: _Fields) -> str:
    """The cgroup that runtime options, fields of an Any, want the shim in."""
    values = dict(packed)
    kind, value = values.get(_ANY_TYPE), values.get(_ANY_VALUE)
    if not isinstance(kind, bytes) or not isinstance(value, bytes):
        return ""
    if kind.rpartition(b"/")[2] != _OPTIONS_TYPE:
        return ""
    return _text(dict(_decode(value)).get(_OPTIONS_SHIM_CGROUP))


def _decode(data: bytes) -> _Fields:
    try:
        return wire.decode(data)
    except ValueError:
        return []


def _text(value: int | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _path(address: str) -> str:
    return address.removeprefix("unix://")
