"""Each service runs from a tree that holds the contracts, the toolbox and itself, no more."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import VERSION

TREE = Path(__file__).parents[2]

# Import names of the third-party packages that only some services may use.
EXTRAS = {
    "aiohttp": ("containerd",),
    "isal": ("containerd",),
    "uvloop": ("containerd", "daemon"),
    "zstandard": ("containerd",),
}

BLOCKER = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} belongs to another service")

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {tree!r})
sys.argv = ["x", "--version"]
runpy.run_module("services.{service}", run_name="__main__")
"""


@pytest.mark.parametrize("service", ["daemon", "containerd", "shim", "cli"])
def test_a_service_needs_no_other(tmp_path, service):
    ignore = shutil.ignore_patterns("__pycache__")
    for part in ["protos", "services/common", f"services/{service}"]:
        shutil.copytree(TREE / part, tmp_path / part, ignore=ignore)
    shutil.copy(TREE / "services/__init__.py", tmp_path / "services/__init__.py")
    blocked = {name for name, users in EXTRAS.items() if service not in users}
    program = BLOCKER.format(blocked=blocked, tree=str(tmp_path), service=service)
    run = subprocess.run(
        [sys.executable, "-I", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert run.returncode == 0, run.stderr
    assert VERSION in run.stdout
