"""PyPI's `containerd` client drives our containerd."""

import json
import sys
from pathlib import Path

import pytest

from services.common import VERSION
from tests.fakes.containerd import ContainerdProcess, node_directory, run_program
from tools import image

pytestmark = pytest.mark.root

PROGRAM = Path(__file__).with_name("pypi_client.py")


async def ctr(containerd, *arguments):
    words = ("ctr", "-a", str(containerd.address), "-n", "pypi", *arguments)
    code, out, err = await run_program(*words)
    assert code == 0, out + err
    return out


async def test_a_client_that_others_generated_runs_a_container(busybox):
    name = "docker.io/library/busybox:1"
    async with node_directory() as directory, ContainerdProcess(directory) as containerd:
        image.write_oci_archive(busybox, directory / "busybox.tar", name)
        await ctr(containerd, "images", "import", str(directory / "busybox.tar"))
        code, out, err = await run_program(
            sys.executable,
            str(PROGRAM),
            str(containerd.address),
            image.digest_of(busybox.layers[0]),
            PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python",
        )
        assert code == 0, err + containerd.log[-3000:]
        found = json.loads(out)
        await ctr(containerd, "images", "rm", "--sync", name)
        assert await containerd.stop() == 0
    assert found == {
        "version": VERSION,
        "plugins": found["plugins"],
        "namespaces": {"other": {"x": "z"}, "pypi": {}},
        "leases": [["key", "snapshots/overlayfs"]],
        "content": {"digest": True, "offset": 10, "text": "words"},
        "images": {"missing": "NOT_FOUND", "names": [name]},
        "pids": True,
        "status": [7, 7],
        "diff": "application/vnd.oci.image.layer.v1.tar+gzip",
        "events": found["events"],
    }
    assert "overlayfs" in found["plugins"]
    assert [event for event in found["events"] if event[0] != "/content/create"] == [
        ["/snapshot/prepare", "SnapshotPrepare"],
        ["/containers/create", "ContainerCreate"],
        ["/tasks/create", "TaskCreate"],
        ["/tasks/start", "TaskStart"],
        ["/tasks/exit", "TaskExit"],
        ["/tasks/delete", "TaskDelete"],
        ["/containers/delete", "ContainerDelete"],
        ["/snapshot/remove", "SnapshotRemove"],
    ]
