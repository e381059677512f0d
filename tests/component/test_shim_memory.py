"""What the factory does for the memory of its shims, and what an idle one has of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fakes.eventually import eventually
from tests.fakes.registry_server import FakeRegistry
from tests.fakes.runtime import install
from tests.fakes.shim_harness import REPOSITORY, FactoryProcess, ShimMaker, plain_spec

# Measured: 6.5 MiB, see ARCHITECTURE.md; what is above this is a thing that somebody should know.
OWN_MAX_KIB = 8 << 10

REHEARSE = """
import os, signal, sys, threading
from services.shim import packing, spared_imports
spared_imports.leave_out()
from services.shim import rehearsal

before = [signal.getsignal(number) for number in rehearsal.SIGNALS]
codes = rehearsal.trace()
names = {code.co_qualname for code in codes.values()}
assert {"Container.create", "Spool.record", "JsonFileFormat.__init__", "_Call.unary"} <= names
old = rehearsal.Shim.run.__code__
packing.gather(codes)
assert rehearsal.Shim.run.__code__ is not old
assert rehearsal.Shim.run.__code__ == old
rehearsal.rehearse()  # with the copies
packing.pack()

assert [signal.getsignal(number) for number in rehearsal.SIGNALS] == before
assert threading.active_count() == 1
assert len(os.listdir("/proc/self/task")) == 1
assert not open("/proc/self/task/%d/children" % os.getpid()).read()
assert "rich" not in {name for name, module in sys.modules.items() if module}
assert "prometheus_client" not in sys.modules
assert "ssl" not in {name for name, module in sys.modules.items() if module}
assert "grpc._cython.cygrpc" in sys.modules
mapped = open("/proc/self/maps").read()
assert not [name for name in ("libssl", "libcrypto", "liblzma", "libbz2") if name in mapped]
spared_imports.let_in()
import bz2, ssl  # what plug-ins import
"""


def test_rehearsal_leaves_nothing_but_warm_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REHEARSE],
        cwd=REPOSITORY,
        env={"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    assert list(tmp_path.iterdir()) == []


def own_kib(pid: int) -> int:
    """Memory that a process shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def ksm_stat(pid: int) -> str:
    """What the kernel says of a process' memory that may be merged."""
    return Path(f"/proc/{pid}/ksm_stat").read_text()


async def mergeable(pid: int) -> bool:
    """True once a process has offered its memory; where the kernel does not tell, at once."""
    if "ksm_mergeable" in ksm_stat(pid):
        await eventually(lambda: "ksm_mergeable: yes" in ksm_stat(pid))
    return True


async def test_idle_shim_has_little_memory_of_its_own(tmp_path):
    factory = FactoryProcess(tmp_path)
    fake = install(tmp_path / "fake")
    async with ShimMaker(factory, tmp_path) as maker:
        registry = FakeRegistry(maker.registry_socket)
        await registry.start()
        shims = []
        for _ in range(3):
            bundle = maker.bundle(plain_spec("/bin/sleep", "1000"))
            shim = await maker.start(bundle)
            log = f"theseus-log://{bundle}/c.log"
            await shim.create(binary=fake.path, stdout=log, stderr=log)
            await shim.start()
            shims.append(shim)
        await registry.wait_for(lambda r: len(r.of("/tasks/start")) == 3)
        assert all([await mergeable(shim.pid) for shim in shims])
        assert "ksm_mergeable: yes" not in ksm_stat((await shims[0].state()).pid)
        assert max(own_kib(shim.pid) for shim in shims) < OWN_MAX_KIB
        await registry.stop()
    assert factory.stop() == 0
