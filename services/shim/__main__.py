"""The command ``theseus-shim``: ``factory``, ``serve``, ``reexec``, ``probe``.

What a subcommand needs is imported when it is chosen: ``--version`` and ``probe`` are quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from services.common import VERSION
from services.common.errors import TheseusError
from services.shim import spared_imports


def main() -> None:
    """Run the command that the arguments name."""
    spared_imports.leave_out()
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except TheseusError as error:
        sys.stderr.write(f"theseus-shim: {error.message}\n")
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="theseus-shim", description="Parent of one container.")
    parser.add_argument("--version", action="version", version=f"theseus-shim {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    factory = commands.add_parser("factory", help="fork shims on request, until stdin is closed")
    factory.add_argument("--socket", type=Path, required=True, help="where requests come in")
    factory.add_argument("--log-level", default="info")
    factory.set_defaults(run=_factory)

    serve = commands.add_parser("serve", help="run one shim in the foreground, without a factory")
    serve.add_argument("--namespace", required=True)
    serve.add_argument("--id", required=True)
    for name in ("bundle", "socket", "registry"):
        serve.add_argument(f"--{name}", required=True, type=lambda text: str(Path(text).absolute()))
    serve.add_argument("--instance-id", default=os.urandom(16).hex())
    serve.add_argument("--default-runtime", default="runc")
    serve.add_argument("--log-level", default="info")
    serve.add_argument("--runtime-timeout-s", type=float, default=60.0)
    serve.add_argument("--linger-s", type=float, default=10.0)
    serve.set_defaults(run=_serve)

    reexec = commands.add_parser("reexec", help="take over from a shim; for its own use")
    what = reexec.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="say whether this program could")
    what.add_argument("--state", type=int, help="descriptor of what is handed over")
    reexec.add_argument("--failure", default="", help="why a newer version was rolled back")
    reexec.set_defaults(run=_reexec)

    keeper = commands.add_parser("keeper", help="hold shims' descriptors, in the background")
    keeper.add_argument("--socket", type=Path, required=True, help="where shims connect")
    keeper.set_defaults(run=_keeper)

    probe = commands.add_parser("probe", help="say which OCI runtimes can be used here, as JSON")
    probe.add_argument("--runtime", action="append", help="name or path; may be repeated")
    probe.set_defaults(run=_probe)
    return parser


def _factory(arguments: argparse.Namespace) -> None:
    from services.common import log
    from services.shim.factory import Factory

    log.configure("shim-factory", arguments.log_level)
    Factory(arguments.socket).run()


def _serve(arguments: argparse.Namespace) -> None:
    import asyncio

    from services.shim.birth import run_shim
    from services.shim.config import ShimConfig
    from services.shim.metrics import ShimMetrics

    spared_imports.let_in()
    config = ShimConfig.from_request(vars(arguments))
    asyncio.run(run_shim(config, ShimMetrics(), _write_answer))


def _reexec(arguments: argparse.Namespace) -> None:
    from services.shim import reexec

    if arguments.check:
        sys.stdout.write(f"{reexec.check()}\n")
        return

    async def run(successor: reexec.Successor) -> None:
        from services.shim.birth import run_shim
        from services.shim.config import ShimConfig
        from services.shim.metrics import ShimMetrics

        spared_imports.let_in()
        config = ShimConfig.from_request(successor.document["config"])
        await run_shim(config, ShimMetrics(), lambda _answer: None, successor)

    reexec.take_over(arguments.state, arguments.failure, run)


def _keeper(arguments: argparse.Namespace) -> None:
    from services.shim import keeper

    sys.exit(keeper.run_in_background(arguments.socket))


def _probe(arguments: argparse.Namespace) -> None:
    from services.shim.runtimes.probe import probe

    spared_imports.let_in()
    results = probe(arguments.runtime or ())
    sys.stdout.write(json.dumps([asdict(result) for result in results], indent=2) + "\n")


def _write_answer(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
