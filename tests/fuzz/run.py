"""Fuzzes one target by atheris.

    python -m tests.fuzz.run TARGET DIRECTORY [OPTION OF LIBFUZZER...]

Inputs that are worth keeping go into DIRECTORY, which begins with the target's seeds; one that
fails is written there as ``crash-...``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["services.containerd"]):
    from tests.fuzz.targets import TARGETS, words


def main(arguments: list[str]) -> None:
    """Fuzz; does not return."""
    if len(arguments) < 2 or arguments[0] not in TARGETS:
        sys.exit(f"usage: run TARGET DIRECTORY [OPTION...]; the targets are {words()}")
    name, directory = arguments[0], Path(arguments[1])
    target = TARGETS[name]
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (directory / f"seed-{number}").write_bytes(seed)
    options = [f"-artifact_prefix={directory}/", *arguments[2:]]
    atheris.Setup([name, str(directory), *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
