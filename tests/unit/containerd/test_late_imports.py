"""What the start of containerd must not wait for."""

from __future__ import annotations

import subprocess
import sys

_CHECK = """
import sys
import services.containerd.app
there = {name for name, module in sys.modules.items() if module is not None}
late = {"aiohttp", "rich", "grpc_reflection.v1alpha", "opentelemetry", "isal", "yarl"}
parts = ("late.transfers", "late.sandboxes", "late.upgrades", "snapshots.remote", "remotes")
print(*sorted(there & (late | {f"services.containerd.{part}" for part in parts})))
"""


def test_a_start_imports_nothing_that_only_a_pull_or_nobody_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHECK], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []
