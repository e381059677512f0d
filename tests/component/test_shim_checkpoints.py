"""Checkpoint and restore, with the fake runtime in criu's place."""

from __future__ import annotations

import json
import shutil

import pytest
from google.protobuf import any_pb2

from protos.containerd.task.v3 import shim_pb2
from protos.containerd.types.runc.options import oci_pb2
from protos.containerd.types.task import task_pb2
from services.common import errors
from tests.fakes.shim_harness import FactoryProcess, KeeperProcess, ShimMaker, plain_spec

SLEEP = ("sleep", "1000")
CRIU = """(00.02) Adjust mmap_min_addr 0x1000 -> 0x10000
(00.03) Error (criu/vdso.c:381): vdso: Unexpected rt vDSO area bounds
(00.04) Error (criu/kerndat.c:1615): kerndat_vdso_fill_symtable failed
(00.05) files stat: fs/nr_open 1048576
"""
SAID = r"criu says: vdso: Unexpected rt vDSO area bounds; kerndat_vdso_fill_symtable failed$"


async def running(maker, fake, *command):
    shim = await maker.start(maker.bundle(plain_spec(*(command or SLEEP))))
    await shim.create(binary=fake.path)
    await shim.start()
    return shim


async def checkpoint(shim, path, **options):
    value = oci_pb2.CheckpointOptions(**options)
    packed = any_pb2.Any(
        type_url="containerd.runc.v1.CheckpointOptions", value=value.SerializeToString()
    )
    request = shim_pb2.CheckpointTaskRequest(id=shim.id, path=str(path), options=packed)
    await shim.call("Checkpoint", request)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.mkdir()
    (path / "image.json").write_text("{}")
    return path


async def test_options_reach_the_runtime_as_its_words(maker, fake, registry, tmp_path):
    shim = await running(maker, fake)
    path = tmp_path / "saved"
    await checkpoint(
        shim,
        path,
        open_tcp=True,
        external_unix_sockets=True,
        terminal=True,
        file_locks=True,
        empty_namespaces=["network", "ipc"],
        cgroups_mode="soft",
        work_path=str(tmp_path / "work"),
        parent_path="/parent",
    )
    command = fake.calls()[-1]
    assert command == [
        *("checkpoint", "--image-path", str(path), "--work-path", str(tmp_path / "work")),
        *("--leave-running", "--tcp-established", "--ext-unix-sk", "--shell-job", "--file-locks"),
        *("--empty-ns", "network", "--empty-ns", "ipc", "--manage-cgroups-mode", "soft"),
        *("--parent-path", "/parent", shim.id),
    ]
    assert (await shim.state()).status == task_pb2.RUNNING
    assert (tmp_path / "work").is_dir()
    await registry.wait_for_topic("/tasks/checkpointed")


async def test_a_container_that_is_to_end_with_it_is_told_of_in_order(
    maker, fake, registry, tmp_path
):
    shim = await running(maker, fake)
    await checkpoint(shim, tmp_path / "saved", exit=True)
    assert (await shim.wait()).exit_status == 137
    await shim.delete()
    await registry.wait_for_topic("/tasks/delete")
    assert registry.topics()[-3:] == ["/tasks/checkpointed", "/tasks/exit", "/tasks/delete"]
    assert not (shim.bundle / "criu-work").exists()


async def test_what_criu_says_is_told_and_the_container_goes_on(maker, fake, registry, tmp_path):
    shim = await running(maker, fake)
    fake.fail_criu(CRIU)
    with pytest.raises(errors.FailedPrecondition, match=SAID):
        await checkpoint(shim, tmp_path / "saved")
    assert (await shim.state()).status == task_pb2.RUNNING
    assert not (shim.bundle / "criu-work").exists()
    assert "/tasks/checkpointed" not in registry.topics()


async def test_a_checkpoint_that_makes_no_sense_is_refused(maker, fake, tmp_path):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    await shim.create(binary=fake.path)
    with pytest.raises(errors.FailedPrecondition, match="it is created"):
        await checkpoint(shim, tmp_path / "saved")
    await shim.start()
    for path, options, words in (
        ("", {}, "needs a directory"),
        ("relative", {}, "not an absolute path"),
        ("/x", {"work_path": "relative"}, "work_path 'relative'"),
        ("/x", {"parent_path": "relative"}, "parent_path 'relative'"),
    ):
        with pytest.raises(errors.InvalidArgument, match=words):
            await checkpoint(shim, path, **options)
    for type_url, value in (("other.Options", b""), ("", b"\xff\xff")):
        packed = any_pb2.Any(type_url=type_url, value=value)
        request = shim_pb2.CheckpointTaskRequest(id=shim.id, path="/x", options=packed)
        with pytest.raises(errors.InvalidArgument, match="options of a checkpoint"):
            await shim.call("Checkpoint", request)
    (tmp_path / "file").touch()
    with pytest.raises(errors.FailedPrecondition, match="criu cannot work in"):
        await checkpoint(shim, tmp_path / "saved", work_path=str(tmp_path / "file" / "x"))
    assert "checkpoint" not in [call[0] for call in fake.calls()]


async def test_a_runtime_that_lacks_it_says_so(maker, fake, tmp_path, monkeypatch):
    configuration = tmp_path / "runtimes.json"
    entry = {"path": str(fake.path), "lacks": ["checkpoint"]}
    configuration.write_text(json.dumps({"poor": entry}))
    monkeypatch.setenv("THESEUS_RUNTIMES", str(configuration))
    (tmp_path / "own").mkdir()
    own = FactoryProcess(tmp_path / "own")
    async with ShimMaker(own, tmp_path / "own") as poor:
        shim = await poor.start(poor.bundle(plain_spec(*SLEEP)))
        await shim.create(binary="poor")
        await shim.start()
        with pytest.raises(errors.Unimplemented, match="'poor' cannot checkpoint"):
            await checkpoint(shim, tmp_path / "saved")
    assert own.stop() == 0


async def test_a_container_is_restored_at_its_start(maker, fake, registry, image, tmp_path):
    log = tmp_path / "c.log"
    uri = f"theseus-log://{log}"
    shim = await maker.start(maker.bundle(plain_spec("sh", "-c", "echo again; exit 9")))
    created = await shim.create(binary=fake.path, checkpoint=str(image), stdout=uri, stderr=uri)
    assert created.pid == 0
    assert (await shim.state()).status == task_pb2.CREATED
    assert fake.calls() == []
    shutil.rmtree(image)  # who passed it need not keep it
    assert (await shim.start()).pid > 0
    assert (await shim.wait()).exit_status == 9
    assert json.loads(log.read_text())["log"] == "again\n"
    command = fake.calls()[0]
    assert command[0] == "restore"
    assert {"--detach", "--no-subreaper"} < set(command)
    await shim.delete()
    await registry.wait_for_topic("/tasks/delete")
    assert registry.topics() == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]


async def test_a_restore_that_fails_leaves_a_container_that_can_be_deleted(
    maker, fake, registry, image
):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    await shim.create(binary=fake.path, checkpoint=str(image))
    fake.fail_criu(CRIU)
    for _ in range(2):
        with pytest.raises(errors.FailedPrecondition, match=SAID):
            await shim.start()
    state = await shim.state()
    assert (state.status, state.pid) == (task_pb2.CREATED, 0)
    with pytest.raises(errors.NotFound):
        await shim.kill()
    (fake.directory / "criu-fails").unlink()
    await shim.start()
    assert (await shim.state()).status == task_pb2.RUNNING


async def test_one_that_was_never_restored_is_deleted(maker, fake, registry, image):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    await shim.create(binary=fake.path, checkpoint=str(image))
    assert (await shim.delete()).exit_status == 0
    with pytest.raises(errors.NotFound):
        await shim.state()


async def test_what_cannot_be_restored_is_refused_and_leaves_nothing(maker, fake, tmp_path):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)))
    (tmp_path / "empty").mkdir()
    for path, kind, words in (
        ("relative", errors.InvalidArgument, "not an absolute path"),
        ("/nothing/here", errors.FailedPrecondition, "No such file or directory"),
        (str(tmp_path / "empty"), errors.FailedPrecondition, "is empty"),
    ):
        with pytest.raises(kind, match=words):
            await shim.create(binary=fake.path, checkpoint=path)
    with pytest.raises(errors.NotFound):
        await shim.state()
    await shim.create(binary=fake.path)


@pytest.fixture
def keeper(tmp_path):
    keeper = KeeperProcess(tmp_path)
    yield keeper
    keeper.kill()


async def test_a_restore_outlives_a_reexecution_and_not_a_dead_shim(maker, fake, image, keeper):
    shim = await maker.start(maker.bundle(plain_spec(*SLEEP)), keeper=str(keeper.socket))
    await shim.create(binary=fake.path, checkpoint=str(image))
    await shim.reexec()
    other = await maker.start(maker.bundle(plain_spec(*SLEEP)), keeper=str(keeper.socket))
    await other.create(binary=fake.path, checkpoint=str(image))
    await shim.start()
    assert (await shim.state()).status == task_pb2.RUNNING
    await other.die()
    successor = await maker.adopt(other)
    with pytest.raises(errors.FailedPrecondition, match="lost its streams with its shim"):
        await successor.start()
    await successor.delete()
