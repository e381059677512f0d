"""What the engine refuses: in one sentence, with the code that upstream gives, leaving nothing."""

import asyncio

import grpc
import pytest

from protos.theseus.engine.v1 import containers_pb2 as pb
from protos.theseus.engine.v1 import containers_pb2_grpc
from services.common.client import connect

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "1m"], "memory"),
        (["--cpus", "-1"], "cpu"),
        (["--cpus", "100000"], "cpu"),
        (["--network", "nope"], "nope"),
        (["--user", "nobody-knows-them"], "nobody-knows-them"),
        (["--workdir", "relative"], "relative"),
        (["--runtime", "nope"], "nope"),
        (["--cap-add", "NOPE"], "NOPE"),
        (["--security-opt", "nope"], "nope"),
        (["--stop-signal", "NOPE"], "NOPE"),
        (["-v", "/a:relative"], "relative"),
        (["-v", "no/slash:/x"], "no/slash"),
        (["--mount", "type=bind,src=/does/not/exist,dst=/x"], "/does/not/exist"),
        (["-e", "=x"], "=x"),
        (["-p", "70000:80"], "70000"),
        (["-h", "not a name"], "not a name"),
        (["--name", "not a name"], "not a name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(theseus, options, words):
    with theseus.leaves_nothing():
        result = theseus.run(*options, "--", "true")
    assert result.code == 125, result
    assert words.lower() in result.err.lower()
    assert result.out == ""
    assert "Traceback" not in result.err


def test_a_name_in_use(theseus):
    theseus.start("--name", "taken", "--", "sleep", "60")
    with theseus.leaves_nothing():
        result = theseus.run("--name", "taken", "--", "true")
    assert result.code == 125
    assert "taken" in result.err and "in use" in result.err
    theseus.ok("rm", "-f", "taken")
    assert theseus.run("--name", "taken", "--", "true").code == 0


def test_a_runtime_that_is_configured_and_not_there(theseus):
    with theseus.leaves_nothing():
        result = theseus.run("--runtime", "nope", "--", "true")
    assert result.code == 125
    assert "nope" in result.err and "runc" in result.err


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"image": "no-such-image-here"}, grpc.StatusCode.NOT_FOUND),
        ({"image": "Bad Reference"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"working_dir": "x"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"resources": {"memory_bytes": 1}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"resources": {"pids_limit": -7}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"command": ["x\0y"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"env": ["A\0=b"]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"mounts": [{"type": "TYPE_BIND", "target": "/x"}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"ports": [{"container_port": 0}]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"ports": [{"container_port": 80, "protocol": "x"}]}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=str,
)
def test_codes_of_create(theseus, config, code):
    from google.protobuf.json_format import ParseDict

    whole = {"image": theseus.image} | config if config else {}
    request = pb.CreateContainerRequest(config=ParseDict(whole, pb.ContainerConfig()))

    async def create():
        async with connect(theseus.engine.socket) as channel:
            await containers_pb2_grpc.ContainersStub(channel).Create(request, timeout=20)

    with theseus.leaves_nothing(), pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(create())
    assert caught.value.code() is code, caught.value.details()
    assert caught.value.details()


@pytest.mark.parametrize("method", ["Start", "Stop", "Kill", "Remove", "Wait", "Get"])
def test_unknown_containers_are_not_found(theseus, method):
    async def call():
        async with connect(theseus.engine.socket) as channel:
            stub = getattr(containers_pb2_grpc.ContainersStub(channel), method)
            request = getattr(pb, f"{method}ContainerRequest")(container="no-such-container")
            await stub(request, timeout=20)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(call())
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "no-such-container" in caught.value.details()


def test_kill_of_one_that_does_not_run_is_a_failed_precondition(theseus):
    theseus.start("--name", "over", "--", "true")
    theseus.ok("wait", "over")

    async def kill(signal_name):
        async with connect(theseus.engine.socket) as channel:
            request = pb.KillContainerRequest(container="over", signal=signal_name)
            await containers_pb2_grpc.ContainersStub(channel).Kill(request, timeout=20)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(kill(""))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        asyncio.run(kill("NOPE"))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
