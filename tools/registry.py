"""Debian's docker-registry on loopback, for the demo, the bench and the tests."""

from __future__ import annotations

import socket
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CONFIG = """\
version: 0.1
log: {{level: info}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http:
  addr: {address}
"""
_AUTH = """\
auth:
  htpasswd: {{realm: theseus, path: {path}}}
"""


@contextmanager
def serving(directory: Path, *, users: str = "") -> Iterator[str]:
    """Run a registry that keeps its data below ``directory``; gives its ``HOST:PORT``.

    ``users`` is the text of an htpasswd file (bcrypt); without it everybody may do everything.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = directory / "config.yml"
    text = _CONFIG.format(root=directory / "data", address=address)
    if users:
        (directory / "htpasswd").write_text(users)
        text += _AUTH.format(path=directory / "htpasswd")
    config.write_text(text)
    process = subprocess.Popen(
        ["docker-registry", "serve", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OTEL_TRACES_EXPORTER": "none"},
    )
    assert process.stderr is not None
    drain = None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "listening on" in line:
                break
        else:
            raise RuntimeError(f"docker-registry did not start: {''.join(said)}")
        # What it says from now on goes nowhere: a full pipe must not stop it.
        drain = subprocess.Popen(
            ["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        process.stderr.close()
        yield address
    finally:
        process.terminate()
        process.wait(timeout=10)
        if drain is not None:
            drain.wait(timeout=10)
