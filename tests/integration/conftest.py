"""One engine for all tests that drive the whole of it.

The engine is `theseus up` in a directory with a short path, beside a registry on loopback that has
a busybox.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.integration.ctr_script import COMPARED
from tests.integration.theseus import BRIDGE, GATEWAY, Theseus
from tools import engine as engines
from tools import image, leaks, registry


def pytest_terminal_summary(terminalreporter, config):
    compared = config.stash.get(COMPARED, None)
    if not compared:
        return
    terminalreporter.section("ctr on our containerd, and on Debian's own")
    counts, differences = {}, []
    for step, ours, theirs in compared:
        same, differing = counts.get(step.command, (0, 0))
        counts[step.command] = (same + (ours == theirs), differing + (ours != theirs))
        if ours != theirs:
            reason = step.differs or "NOT MEANT"
            differences.append(f"  ctr {step.title[:60]}: {reason}")
    for command, (same, differing) in counts.items():
        more = f", {differing} different" if differing else ""
        terminalreporter.write_line(f"ctr {command:<24} {same} the same{more}")
    terminalreporter.write_line("different:")
    for line in differences:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def home():
    """Where the engine lives: a short path, since those of Unix sockets are limited."""
    directory = Path(tempfile.mkdtemp(prefix="theseus-t-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def registry_directory(home):
    return home / "registry"


@pytest.fixture(scope="session")
def registry_address(registry_directory):
    with registry.serving(registry_directory) as address:
        yield address


@pytest.fixture(scope="session")
def busybox():
    return image.busybox()


@pytest.fixture(scope="session")
def whole_engine(home, registry_address, busybox):
    image.push(busybox, registry_address, "busybox", "latest")
    before = leaks.taken()
    options = ["--bridge-name", BRIDGE, "--bridge-subnet", f"{GATEWAY}/16", "--log-level", "debug"]
    options.append("--containerd-option=--merge-memory=off")  # the kernel's switch is the host's
    try:
        with engines.running(home, options) as engine:
            theseus = Theseus(engine, registry_address)
            theseus.ok("pull", theseus.image)
            theseus.ok("run", "--rm", theseus.image, "true")  # makes the bridge, which stays
            yield theseus
            theseus.wait_until_up()
            if found := theseus.ok("ps", "-aq").split():
                theseus.ok("rm", "-f", "-v", *found)
    finally:
        keep = os.environ.get("THESEUS_TEST_LOG")
        if keep:
            shutil.copy(home / "up.log", keep)
    leaks.clear(before)


@pytest.fixture
def theseus(whole_engine):
    """The command; containers that a test leaves are removed after it."""
    yield whole_engine
    left = whole_engine("ps", "-aq").out.split()
    if left:
        whole_engine("rm", "-f", "-v", *left)


@pytest.fixture(params=["runc", "crun"])
def runtime(request):
    """Name of an OCI runtime."""
    if shutil.which(request.param) is None:
        pytest.fail(f"{request.param} is not installed: use make setup")
    return request.param
