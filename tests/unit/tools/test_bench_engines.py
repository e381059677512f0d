import os
import socket
import struct
import subprocess
import sys
import threading

import pytest

from protos.containerd.task.v2 import shim_pb2
from services.shim import app as shim_app
from tools.bench import memory
from tools.bench.cases import memory as memory_case
from tools.bench.engines import CONTAINERDS, DAEMONS, PACKED, packed, spec, ttrpc
from tools.bench.engines.containerd import theseus_tier
from tools.bench.engines.engine import BenchError, Plan
from tools.bench.engines.server import Server
from tools.bench.engines.spec import specification
from tools.bench.figures import Role
from tools.bench.memory import processes, pss_mib
from tools.bench.pictures import big_files, chain, chain_id, many_files
from tools.image import build, digest_of

HEADER = struct.Struct(">IIBB")


class _Pictures:
    busybox_name = "busybox"

    def reference(self, name):
        return f"registry/{name}:latest"


@pytest.mark.parametrize("kind", [*CONTAINERDS, *DAEMONS, *PACKED])
def test_engines_keep_all_that_is_theirs_below_their_place(kind, tmp_path):
    engine = kind(tmp_path, _Pictures())

    assert all(str(tmp_path) in str(server.address) for server in engine.servers)
    assert engine.subject.role in (Role.OURS, Role.PEER)
    assert set(engine.networks) <= {"none", "bridge"}


def test_a_comparison_has_one_of_ours_and_peers():
    for kinds in (CONTAINERDS, DAEMONS, PACKED):
        assert [kind.subject.role for kind in kinds].count(Role.OURS) == 1
        assert len({kind.api for kind in kinds}) == 1


async def test_containers_of_debians_containerd_are_of_one_group_after_the_other(
    tmp_path, monkeypatch
):
    groups = []

    async def create(self, plan):
        groups.append(specification(plan)["annotations"]["io.containerd.runc.v2.group"])
        return str(len(groups))

    monkeypatch.setattr(packed.DebianContainerd, "create", create)
    monkeypatch.setattr(spec, "_default", lambda: {"process": {}, "mounts": []})
    engine = packed.PackedDebian(tmp_path, _Pictures())
    for _ in range(2 * packed.EACH + 1):
        await engine.create(Plan())

    assert [groups.count(group) for group in dict.fromkeys(groups)] == [16, 16, 1]
    assert "annotations" not in specification(Plan())


def test_a_shim_that_waits_is_containerds(monkeypatch):
    argv = ["python", "-m", "services.shim", "factory"]
    names = {1: "theseus-shim", 2: "theseus-waiting"}
    monkeypatch.setattr(memory, "parent", lambda _: 1)
    monkeypatch.setattr(memory, "name", names.get)

    assert [theseus_tier(pid, argv) for pid in names] == ["shim", "containerd"]


def test_memory_is_not_steady_before_shims_have_offered_theirs():
    assert memory_case._TO_OFFER_S >= shim_app._SETTLED_S + memory_case._LOOK_S


def test_many_files_are_as_many_as_asked_for_and_the_same_every_time():
    layers = many_files(403)

    names = _names(layers)
    files = [name for name in names if name.startswith("data/") and name.count("/") == 3]
    assert len(set(files)) == len(files) == 403
    assert many_files(403) == layers
    assert len(layers) == 5


def test_big_files_have_their_size_and_compress_to_less_than_half():
    layers = big_files(6)

    assert sum(map(len, layers[1:])) >= 6 << 20
    compressed = sum(len(data) for data in build(layers[1:]).blobs.values())
    assert 0.3 < compressed / sum(map(len, layers[1:])) < 0.5


def test_chain_has_a_file_in_every_layer():
    assert [name for name in _names(chain(4)) if "layer-" in name] == [
        "layer-1",
        "layer-2",
        "layer-3",
    ]


def test_chain_id_of_two_layers_is_that_of_the_specification():
    # sha256("<digest of the lower one> <digest of the upper one>"), by the OCI's definition.
    first, second = b"1", b"2"
    expected = digest_of(f"{digest_of(first)} {digest_of(second)}".encode())

    assert chain_id(build([first])) == digest_of(first)
    assert chain_id(build([first, second])) == expected


def test_processes_of_an_engine_are_found_by_its_directory_with_their_children(tmp_path):
    script = (
        "import subprocess, sys\n"
        "code = 'print(flush=True); input()'  # a program that has just begun has no words yet\n"
        "pipe = subprocess.PIPE\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdin=pipe, stdout=pipe)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "input()\n"
        "child.communicate()\n"
    )
    engine = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "engine" / "socket")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        child = int(engine.stdout.readline())
        found = processes(str(tmp_path / "engine"))
        assert set(found) == {engine.pid, child}
        assert found[engine.pid][-1] == str(tmp_path / "engine" / "socket")
        assert processes(str(tmp_path / "eng")) == {}  # another engine's, whose name is shorter
        assert 0 < pss_mib(child) < 100
    finally:
        engine.communicate("\n")
    assert os.getpid() not in found


def _serve(path, reply):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    received = []

    def answer():
        connection, _ = listener.accept()
        length, stream, kind, flags = HEADER.unpack(connection.recv(HEADER.size))
        received.append((stream, kind, flags, connection.recv(length)))
        connection.sendall(reply)
        connection.close()
        listener.close()

    thread = threading.Thread(target=answer)
    thread.start()
    return thread, received


def test_ttrpc_call_is_framed_as_the_protocol_says(tmp_path):
    thread, received = _serve(tmp_path / "s", HEADER.pack(2, 1, 2, 0) + b"\x12\x00")

    ttrpc.call(str(tmp_path / "s"), "service", "Method", shim_pb2.ConnectRequest(id="x"))

    thread.join()
    assert received == [(1, 1, 0, b"\x0a\x07service\x12\x06Method\x1a\x03\x0a\x01x")]


@pytest.mark.parametrize(
    "reply",
    [HEADER.pack(2, 1, 2, 0) + b"\x0a\x00", HEADER.pack(0, 1, 1, 0), b"\0\0"],
    ids=["a status", "a request", "half a header"],
)
def test_ttrpc_call_that_fails_is_told(tmp_path, reply):
    thread, _ = _serve(tmp_path / "s", reply)

    with pytest.raises(BenchError):
        ttrpc.call(str(tmp_path / "s"), "service", "Method", shim_pb2.ConnectRequest(id="x"))

    thread.join()


_SERVER = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    listener.accept()[0].close()
"""


async def _answers(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))


def _server(tmp_path, script):
    return Server(
        "server",
        [sys.executable, "-c", script, str(tmp_path / "s")],
        address=tmp_path / "s",
        answers=_answers,
        log=tmp_path / "log",
    )


async def test_server_is_up_when_it_answers_and_dies_at_once(tmp_path):
    server = _server(tmp_path, _SERVER)

    assert 0 < await server.start() < 30
    server.kill()

    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)
    await server.stop()


async def test_server_that_ends_instead_says_why(tmp_path):
    server = _server(tmp_path, "raise SystemExit('no such luck')")

    with pytest.raises(BenchError, match="ended with 1: no such luck"):
        await server.start()


def test_plan_is_small_unless_said_otherwise():
    assert Plan() == Plan(command=("true",), runtime="runc", network="none")


def _names(layers):
    import io
    import tarfile

    return [
        member.name
        for layer in layers
        for member in tarfile.open(fileobj=io.BytesIO(layer)).getmembers()
    ]
