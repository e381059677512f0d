"""Runtimes that are not built in: the plug-in of docs/RUNTIMES.md, and a configured program."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from protos.containerd.task.v3 import shim_pb2
from services.common import errors
from tests.fakes.runtime import install
from tests.fakes.shim_harness import REPOSITORY, FactoryProcess, plain_spec

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = REPOSITORY / "docs" / "RUNTIMES.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A directory with the document's example, installed, and a plug-in that does not load."""
    directory = tmp_path_factory.mktemp("site")
    source = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    project = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    entry = re.search(r'theseus\.runtimes"\]\n(.*)\n', project)[1].replace('"', "")
    (directory / "bare_runtime.py").write_text(source)
    for name, line in (("bare_runtime", entry), ("broken", "broken = no_such_module:Runtime")):
        info = directory / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[theseus.runtimes]\n{line}\n")
    return directory


@pytest.fixture(scope="module")
def configuration(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("configuration") / "runtimes.json"


@pytest.fixture(scope="module")
def factory(tmp_path_factory, site, configuration):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        patch.setenv("THESEUS_RUNTIMES", str(configuration))
        factory = FactoryProcess(tmp_path_factory.mktemp("factory"))
    yield factory
    assert factory.stop() == 0


async def test_example_of_the_document_runs_containers(maker):
    spec = plain_spec("/bin/sh", "-c", "echo $A; read x; exit 4", env=["A=hello"])
    shim = await maker.start(maker.bundle(spec))
    await shim.create(binary="bare", stdin="theseus-stream:", stdout="theseus-stream:")
    await shim.start()
    async with shim.attach(input=True, output=True) as attached:
        assert await attached.read_until(b"hello\n") == b"hello\n"
        await shim.exec("e", ["/bin/sh", "-c", "exit 3"])
        assert (await shim.wait("e")).exit_status == 3
        await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
        await shim.call("Resume", shim_pb2.ResumeRequest(id=shim.id))
        with pytest.raises(errors.Unimplemented, match="knows no limits"):
            resources = {"value": b"{}"}
            await shim.call("Update", shim_pb2.UpdateTaskRequest(id=shim.id, resources=resources))
        with pytest.raises(errors.Unimplemented, match="'bare' has no checkpoints"):
            request = shim_pb2.CheckpointTaskRequest(id=shim.id, path="/nowhere")
            await shim.call("Checkpoint", request)
        await attached.write(0, b"\n")
        assert (await shim.wait()).exit_status == 4
    assert (await shim.info()).runtime == "bare: bare 1.0"
    await shim.delete()


async def test_plug_in_that_cannot_be_loaded_is_told(maker):
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    with pytest.raises(errors.FailedPrecondition, match=r"broken.*no_such_module"):
        await shim.create(binary="broken")
    with pytest.raises(errors.FailedPrecondition, match="not installed"):
        await shim.create(binary="no-such-runtime")


async def test_configured_program_is_used_and_its_lacks_are_respected(
    maker, configuration, tmp_path
):
    fake = install(tmp_path / "fake")
    configuration.write_text(
        json.dumps({"mine": {"path": str(fake.path), "lacks": ["pause", "exec", "kill-all"]}})
    )
    shim = await maker.start(maker.bundle(plain_spec("/bin/sleep", "1000")))
    await shim.create(binary="mine")
    await shim.start()
    with pytest.raises(errors.Unimplemented, match="'mine' cannot pause"):
        await shim.call("Pause", shim_pb2.PauseRequest(id=shim.id))
    with pytest.raises(errors.Unimplemented, match="one more process"):
        await shim.exec("e", ["/bin/true"])
    with pytest.raises(errors.Unimplemented, match="everything"):
        await shim.kill(all=True)
    assert {call[0] for call in fake.calls()} == {"create", "start"}
    await shim.kill()
    await shim.wait()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"x": {"path": "relative"}}', "no absolute path"),
        ('{"x": {"path": "/x", "lacks": ["speed"]}}', "unknown words: speed"),
        ('{"x": {"path": "/x", "arguments": "all"}}', "lists of strings"),
    ],
)
async def test_wrong_configuration_is_told_in_words(maker, configuration, text, words):
    configuration.write_text(text)
    shim = await maker.start(maker.bundle(plain_spec("/bin/true")))
    with pytest.raises(errors.InvalidArgument, match=words):
        await shim.create(binary="x")


def test_probe_lists_programs_configured_ones_and_plug_ins(site, tmp_path):
    configuration = tmp_path / "runtimes.json"
    fake = install(tmp_path / "fake")
    configuration.write_text(json.dumps({"mine": {"path": str(fake.path)}}))
    answer = subprocess.run(
        [sys.executable, "-m", "services.shim", "probe"],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(site), "THESEUS_RUNTIMES": str(configuration)},
        capture_output=True,
        check=True,
    )
    found = {entry["name"]: entry for entry in json.loads(answer.stdout)}
    assert {"runc", "crun", "mine", "bare", "broken"} <= set(found)
    assert found["mine"]["version"] == "fake-runtime version 1.0"
    assert (found["bare"]["usable"], found["bare"]["version"]) == (True, "bare_runtime 1.0")
    assert "no_such_module" in found["broken"]["reason"]
