"""``up``: containerd and the daemon in the foreground, where nothing else supervises them."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from services.cli.commands import Command
from services.cli.supervisor import Supervisor, Tier, program
from services.common import log
from services.common.root_lock import RootLock

if TYPE_CHECKING:
    from argparse import Namespace

    from services.cli.engine import Engine
    from services.cli.parser import Parser

_OTHER_S = 0.5
"""How long to wait for another ``up`` that is leaving the same root."""

_LOCK_TIMEOUT_S = 10
"""How long a tier waits for one that is leaving the same root."""


def _arguments(parser: Parser) -> None:
    option = parser.option
    option("--root", metavar="DIR", default="/var/lib/theseus", help="records (%(default)s)")
    option("--state", metavar="DIR", default="/run/theseus", help="sockets (%(default)s)")
    option("--default-runtime", metavar="NAME", default="runc", help="(%(default)s)")
    option("--bridge-name", metavar="NAME", default="theseus0", help="(%(default)s)")
    option("--bridge-subnet", metavar="SUBNET", default="10.77.0.1/16", help="(%(default)s)")
    metrics = "where {}'s metrics are, unix:PATH or HOST:PORT (STATE/{}/metrics.sock)"
    for tier in ("containerd", "daemon"):
        option(f"--{tier}-metrics-address", metavar="ADDRESS", help=metrics.format(tier, tier))
        parser.many(f"--{tier}-option", metavar="OPTION", help=f"a further option of {tier}")
    option("--log-dir", metavar="DIR", help="write a log file per tier; stderr if not given")
    parser.add_argument("--log-level", choices=log.LEVELS, default="info", help="(%(default)s)")
    parser.words("nothing", at_most=0)


async def _up(engine: Engine, options: Namespace) -> int:
    del engine  # it is what we start
    log.configure("up", options.log_level)
    containerd, daemon = _tiers(options)
    supervisor = Supervisor([containerd, daemon])
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.stop)
    async with RootLock(Path(options.root)).held(_OTHER_S), supervisor:
        await supervisor.ready()
        if not supervisor.stopping:
            sys.stdout.write(f"theseus is up: export THESEUS_HOST=unix://{daemon.socket}\n")
            sys.stdout.flush()
        await supervisor.stopped()
    return 0


def _tiers(options: Namespace) -> tuple[Tier, Tier]:
    """containerd and the daemon, in the order in which they start."""
    state = Path(options.state).absolute()
    containerd = _tier(
        "containerd", options, "containerd.sock", f"--default-runtime={options.default_runtime}"
    )
    daemon = _tier(
        "daemon",
        options,
        "daemon.sock",
        f"--containerd={state}/containerd/containerd.sock",
        f"--default-runtime={options.default_runtime}",
        f"--bridge-name={options.bridge_name}",
        f"--bridge-subnet={options.bridge_subnet}",
    )
    return containerd, daemon


def _tier(name: str, options: Namespace, socket: str, *own: str) -> Tier:
    root = Path(options.root).absolute() / name
    state = Path(options.state).absolute() / name
    metrics = getattr(options, f"{name}_metrics_address") or f"unix:{state}/metrics.sock"
    return Tier(
        name=name,
        command=(
            *program(name),
            f"--root={root}",
            f"--state={state}",
            f"--metrics-address={metrics}",
            f"--log-level={options.log_level}",
            f"--lock-timeout={_LOCK_TIMEOUT_S}",
            *own,
            *getattr(options, f"{name}_option"),
        ),
        socket=state / socket,
        log_file=Path(options.log_dir).absolute() / f"{name}.log" if options.log_dir else None,
    )


COMMANDS = {"up": Command(_arguments, _up)}
