"""What containerd waits for: command line, request, answer, without a slow import."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import any_pb2
from hypothesis import given
from hypothesis import strategies as st

from protos.containerd.runtime.bootstrap.v1 import bootstrap_pb2
from protos.containerd.task.v2 import shim_pb2
from protos.containerd.types import introspection_pb2
from protos.containerd.types.runc.options import oci_pb2
from services.common import VERSION
from services.common.errors import FailedPrecondition, InvalidArgument
from services.shim.runtimes.runtime import RuntimeMissing
from services.shim.ttrpc import bootstrap, ending, home, info, launcher, warm, wire
from services.shim.ttrpc.flags import Flags, UsageError
from services.shim.ttrpc.request import StartRequest, parse_request

TREE = Path(__file__).parents[3]
CONTAINERD = ["-namespace", "ns", "-address", "/run/c.sock", "-publish-binary", "/x", "-id", "c1"]


def run(*arguments, given=b"", cwd=None, **environment):
    """Run the program."""
    return subprocess.run(
        [sys.executable, "-m", "services.shim.ttrpc", *arguments],
        input=given,
        capture_output=True,
        timeout=30,
        check=False,
        cwd=cwd or TREE,
        env={**os.environ, "PYTHONPATH": str(TREE), **environment},
    )


# Flags


def test_flags_of_containerd_are_understood():
    flags = Flags([*CONTAINERD, "-debug", "-bundle=/b", "start", "-id", "other"])
    assert (flags.namespace, flags.id, flags.address) == ("ns", "c1", "/run/c.sock")
    assert (flags.bundle, flags.action, flags.debug) == ("/b", "start", True)


@pytest.mark.parametrize(
    ("words", "debug"), [(["--debug"], True), (["-debug=false"], False), ([], False)]
)
def test_switches_take_a_value_or_none(words, debug):
    assert Flags([*words, "delete"]).debug is debug


@pytest.mark.parametrize("words", [["-what"], ["-id"], ["--no-such=1", "start"]])
def test_unusable_flags_are_refused(words):
    with pytest.raises(UsageError, match=r"flag"):
        Flags(words)


def test_version_is_printed():
    done = run("-v")
    assert (done.returncode, done.stderr) == (0, b"")
    assert VERSION in done.stdout.decode()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-id", "c", "start"], "-namespace and -id are needed"),
        ([*CONTAINERD], "there is no action ''"),
        ([*CONTAINERD, "dance"], "there is no action 'dance'"),
        (["-frob", "start"], "flag provided but not defined: -frob"),
    ],
)
def test_a_wrong_command_line_fails_with_the_reason(arguments, words):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert words in done.stderr.decode()


def test_start_without_a_spec_fails_in_one_line(tmp_path):
    done = run(
        *CONTAINERD[:-4], "-address", f"{tmp_path}/c.sock", "-id", "c1", "start", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (1, b"")
    assert re.fullmatch(r"containerd-shim-theseus-v1: .*config.json'\n", done.stderr.decode())


# Wire format


FIELDS = st.fixed_dictionaries(
    {
        "instance_id": st.text(),
        "namespace": st.text(),
        "log_level": st.sampled_from([0, -8, -4, 4, 10]),
        "socket_dir": st.text(),
    }
)


@given(FIELDS)
def test_messages_are_read_as_protobuf_writes_them(fields):
    message = bootstrap_pb2.BootstrapParams(**fields)
    read = dict(wire.decode(message.SerializeToString()))
    assert read.get(1, b"") == fields["instance_id"].encode()
    assert read.get(3, 0) == fields["log_level"] % (1 << 64)
    assert read.get(9, b"") == fields["socket_dir"].encode()


@given(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 2**62))
def test_an_ending_is_read_as_a_delete_response(pid, status, exited_at_ns):
    data = ending.Ending(pid, status, exited_at_ns).to_message()
    response = shim_pb2.DeleteResponse.FromString(data)
    assert (response.pid, response.exit_status) == (pid, status)
    assert response.exited_at.ToNanoseconds() == exited_at_ns


@given(st.binary(max_size=64))
def test_garbage_is_an_error_or_fields(data):
    try:
        fields = wire.decode(data)
    except ValueError:
        return
    assert all(number > 0 for number, _ in fields)


@pytest.mark.parametrize("data", [b"\x08", b"\x0a\x05ab", b"\x0b", b"\x00\x01", b"\x80" * 11])
def test_a_message_that_is_cut_off_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        wire.decode(data)


# Request


def parsed(*more, given=b"", **environment):
    flags = Flags([*CONTAINERD, *more, "start"])
    return parse_request(flags, bundle="/b", given=given, environment=environment)


def options(**fields):
    """Runtime options, packed."""
    value = oci_pb2.Options(**fields).SerializeToString()
    return any_pb2.Any(type_url="containerd.runc.v1.Options", value=value)


def test_containerd_1_6_asks_by_flags_and_environment():
    request = parsed("-debug", TTRPC_ADDRESS="/run/c.sock.ttrpc")
    assert (request.namespace, request.id, request.bundle) == ("ns", "c1", "/b")
    assert (request.address, request.ttrpc_address) == ("/run/c.sock", "/run/c.sock.ttrpc")
    assert (request.log_level, request.answer) == ("debug", "plain")


def test_the_event_address_is_guessed_when_nobody_says_it():
    assert parsed().ttrpc_address == "/run/c.sock.ttrpc"


def test_containerd_1_7_gives_options_and_wants_json():
    given = options(shim_cgroup="/shims").SerializeToString()
    request = parsed(given=given, MAX_SHIM_VERSION="2")
    assert (request.answer, request.shim_cgroup) == ("json", "/shims")


def test_containerd_2_3_asks_by_bootstrap_parameters():
    params = bootstrap_pb2.BootstrapParams(
        instance_id="c1",
        namespace="ns",
        log_level=bootstrap_pb2.LOG_LEVEL_TRACE,
        containerd_ttrpc_address="unix:///run/t.sock",
        socket_dir="/run/s",
    )
    params.extensions.add().value.CopyFrom(options(shim_cgroup="/shims"))
    request = parsed(given=params.SerializeToString(), MAX_SHIM_VERSION="2", TTRPC_ADDRESS="/x")
    assert (request.answer, request.log_level) == ("bootstrap", "debug")
    assert (request.ttrpc_address, request.socket_directory) == ("/run/t.sock", "/run/s")
    assert request.shim_cgroup == "/shims"


@pytest.mark.parametrize(("level", "text"), [(0, "info"), (4, "info"), (-4, "debug")])
def test_log_levels_of_bootstrap_parameters(level, text):
    params = bootstrap_pb2.BootstrapParams(instance_id="c1", namespace="ns", log_level=level)
    assert parsed(given=params.SerializeToString()).log_level == text


def test_options_that_could_be_read_as_parameters_are_not():
    given = any_pb2.Any(type_url="c2", value=b"ns").SerializeToString()
    assert parsed(given=given).answer == "plain"


def test_garbage_on_standard_input_does_not_matter():
    assert parsed(given=b"\xff\xff\xff").id == "c1"


@given(st.text(), st.text())
def test_a_request_survives_the_way_to_the_warm_process(bundle, group):
    request = parsed("-debug")
    request.bundle, request.shim_cgroup = bundle, group
    copy = StartRequest.from_bytes(request.to_bytes())
    assert all(getattr(copy, name) == getattr(request, name) for name in request.__slots__)


# Socket and group


@pytest.mark.parametrize(
    ("annotations", "group"),
    [
        ({}, ""),
        ({"io.kubernetes.cri.sandbox-id": "pod"}, "pod"),
        ({"io.containerd.runc.v2.group": "g", "io.kubernetes.cri.sandbox-id": "pod"}, "g"),
        ({"io.containerd.runc.v2.group": "", "io.kubernetes.cri.sandbox-id": "pod"}, "pod"),
        ({"other": "io.containerd.runc.v2.group"}, ""),
        (None, ""),
    ],
)
def test_containers_of_one_pod_are_grouped_by_annotation(tmp_path, annotations, group):
    (tmp_path / "config.json").write_text(json.dumps({"annotations": annotations}))
    assert bootstrap.group_of(str(tmp_path)) == group


def request_at(address, namespace="ns"):
    request = StartRequest()
    request.address, request.namespace = str(address), namespace
    return request


def test_each_containerd_namespace_and_group_has_a_socket_of_its_own(tmp_path):
    paths = {
        bootstrap.socket_path(request_at(tmp_path / name, namespace), group)
        for name in ("a.sock", "b.sock")
        for namespace in ("n1", "n2")
        for group in ("g1", "g2")
    }
    assert len(paths) == 8
    assert {Path(path).parent for path in paths} == {tmp_path / "s"}
    assert bootstrap.socket_path(request_at(tmp_path / "a.sock", "n1"), "g1") in paths


def test_a_socket_needs_an_absolute_address():
    with pytest.raises(ValueError, match="not an absolute path"):
        bootstrap.socket_path(request_at(""), "g")


def test_only_one_shim_listens_and_a_dead_ones_socket_is_replaced(tmp_path):
    path = str(tmp_path / "s")
    first = bootstrap.bind(path)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert bootstrap.bind(path) is None
    first.close()
    second = bootstrap.bind(path)
    assert second is not None
    second.close()


def test_answers_are_what_each_containerd_reads():
    address = "unix:///run/s/x"
    assert bootstrap.answer("plain", address) == address.encode()
    assert json.loads(bootstrap.answer("json", address)) == {
        "version": 2,
        "address": address,
        "protocol": "ttrpc",
    }
    result = bootstrap_pb2.BootstrapResult.FromString(bootstrap.answer("bootstrap", address))
    assert (result.version, result.address, result.protocol) == (3, address, "ttrpc")


# Warm process

WARM = """
import os, sys
from services.shim.ttrpc.warm import Warm, WarmProcess
def become(request, listener):
    os.write(1, request.id.encode() + b"\\n")
    os._exit(0)
warm = Warm(sys.argv[1])
assert warm.listener is not None
os.write(1, b"ready\\n")
WarmProcess(warm.listener, become, idle_limit_s=float(sys.argv[2])).run()
"""


def warm_process(directory, *, idle_limit_s):
    """A warm process whose shims print their id and end; it serves when this returns."""
    command = [sys.executable, "-c", WARM, str(directory), str(idle_limit_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=TREE)
    assert process.stdout.readline() == b"ready\n"
    return process


def test_the_warm_process_forks_a_shim_for_each_request(tmp_path):
    process = warm_process(tmp_path, idle_limit_s=60)
    for number in range(3):
        listener = bootstrap.bind(str(tmp_path / f"s{number}"))
        request = request_at(tmp_path / "c.sock")
        request.id = f"c{number}"
        assert warm.Warm(str(tmp_path)).ask(request, listener)
        assert process.stdout.readline() == f"c{number}\n".encode()
        listener.close()
    process.kill()
    process.communicate()
    # Nobody serves its socket any more, so the next one does.
    successor = warm.Warm(str(tmp_path))
    assert successor.connection is None
    successor.listener.close()


def test_the_warm_process_ends_when_nobody_asks(tmp_path):
    process = warm_process(tmp_path, idle_limit_s=0.01)
    assert process.wait(10) == 0
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_the_warm_process_survives_garbage(tmp_path):
    process = warm_process(tmp_path, idle_limit_s=60)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(warm.path_in(str(tmp_path)))
        connection.send(b"garbage")
        assert connection.recv(1) == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(warm.path_in(str(tmp_path)))
        socket.send_fds(connection, [b"garbage"], [0])
        assert connection.recv(1) == b""
    assert process.poll() is None
    process.kill()
    process.communicate()


# Log


def test_the_log_goes_to_containerds_fifo_and_never_waits(tmp_path):
    os.mkfifo(tmp_path / "log")
    log = launcher.LogPipe(str(tmp_path))
    for _ in range(100):
        log.write("x" * 1023 + "\n")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 1024) == b"x" * 1023 + b"\n"
    os.close(reader)
    log.close()


def test_without_a_fifo_the_log_is_a_file(tmp_path):
    log = launcher.LogPipe(str(tmp_path))
    log.write("a \udcff line\n")
    log.close()
    assert (tmp_path / "shim.log").read_text() == "a \\udcff line\n"


# Ending, home, info


def test_an_ending_is_kept_in_the_bundle(tmp_path):
    assert ending.read(str(tmp_path)) is None
    ending.write(str(tmp_path), ending.Ending(7, 3, 5))
    kept = ending.read(str(tmp_path))
    assert (kept.pid, kept.status, kept.exited_at_ns) == (7, 3, 5)
    (tmp_path / ending.FILE).write_text("garbage")
    assert ending.read(str(tmp_path)) is None


def test_the_shim_enters_the_cgroup_of_each_v1_hierarchy(tmp_path):
    for name in ("cpu", "memory"):
        (tmp_path / name / "shims").mkdir(parents=True)
        (tmp_path / name / "shims" / "cgroup.procs").touch()
    (tmp_path / "pids").mkdir()
    assert home.enter_cgroup("/shims", tmp_path) == []
    for name in ("cpu", "memory"):
        assert (tmp_path / name / "shims" / "cgroup.procs").read_text() == "0"


def test_a_cgroup_that_does_not_exist_is_told(tmp_path):
    assert home.enter_cgroup("/shims", tmp_path) == ["there is no cgroup /shims"]
    (tmp_path / "cgroup.controllers").touch()
    [failure] = home.enter_cgroup("/shims", tmp_path)
    assert "cannot be entered" in failure


def fake_runtime(directory, script):
    path = directory / "fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return options(binary_name=str(path))


def test_info_says_who_we_are_and_what_the_runtime_can_do(tmp_path):
    packed = fake_runtime(tmp_path, 'echo \'{"ociVersionMin": "1.0.0"}\'')
    read = introspection_pb2.RuntimeInfo.FromString(info.runtime_info(packed.SerializeToString()))
    assert (read.name, read.version.version) == ("io.containerd.theseus.v1", VERSION)
    assert read.options == packed
    assert json.loads(read.features.value) == {"ociVersionMin": "1.0.0"}
    assert read.features.type_url.endswith("/features/Features")


def test_info_of_a_runtime_that_says_nothing_about_itself(tmp_path):
    packed = fake_runtime(tmp_path, "exit 1")
    read = introspection_pb2.RuntimeInfo.FromString(info.runtime_info(packed.SerializeToString()))
    assert not read.HasField("features")


def test_info_fails_for_garbage_and_for_a_missing_runtime():
    with pytest.raises(InvalidArgument):
        info.runtime_info(b"\xff")
    missing = options(binary_name="no-such-runtime-here").SerializeToString()
    with pytest.raises((RuntimeMissing, FailedPrecondition)):
        info.runtime_info(missing)


# Imports


def loaded_after(statement):
    """Modules that are there after a statement and were not before."""
    program = f"import sys; before = set(sys.modules); {statement}; " + (
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=TREE,
    )
    return set(done.stdout.split())


def test_a_shim_that_speaks_ttrpc_imports_no_grpc():
    loaded = loaded_after(
        "import services.shim.ttrpc.app, services.shim.ttrpc.cleanup, services.shim.ttrpc.info"
    )
    assert "google.protobuf.message" in loaded
    assert not {name for name in loaded if name.partition(".")[0] in ("grpc", "prometheus_client")}


def test_what_containerd_waits_for_imports_next_to_nothing():
    loaded = loaded_after("import services.shim.ttrpc.__main__, services.shim.ttrpc.bootstrap")
    slow = {
        "asyncio",
        "json",
        "typing",
        "dataclasses",
        "argparse",
        "pathlib",
        "enum",
        "re",
        "socket",
    }
    assert not loaded & slow
    assert not {name for name in loaded if name.startswith(("google", "structlog"))}
