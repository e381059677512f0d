"""The command ``containerd-shim-theseus-v1``, which containerd runs.

``start`` leaves a shim behind and prints its address; ``delete`` clears away what a dead one left.
containerd takes everything on standard error for a part of the answer, so nothing is written there
but the reason of a failure.
"""

from __future__ import annotations

import os
import sys

from services.common import VERSION
from services.shim.ttrpc.flags import USAGE, Flags, UsageError

PROGRAM = "containerd-shim-theseus-v1"


def main() -> None:
    """Do what the command line says."""
    try:
        flags = Flags(sys.argv[1:])
        answer = _answer(flags)
    except UsageError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n{USAGE}")
        sys.exit(2)
    except Exception as error:
        sys.stderr.write(f"{PROGRAM}: {_in_words(error)}\n")
        sys.exit(1)
    while answer:
        answer = answer[os.write(1, answer) :]


def _answer(flags: Flags) -> bytes:
    if flags.help:
        return USAGE.encode()
    if flags.v:
        return f"{PROGRAM}:\n  Version:  {VERSION}\n  Revision: \n\n".encode()
    if flags.info:
        # Imported late, as what follows: each action pays for itself alone.
        from services.shim.ttrpc.info import runtime_info

        return runtime_info(sys.stdin.buffer.read())
    if not flags.namespace or not flags.id:
        raise UsageError("-namespace and -id are needed")
    if flags.action == "start":
        from services.shim.ttrpc.bootstrap import start

        return start(flags)
    if flags.action == "delete":
        return _delete(flags)
    raise UsageError(f"there is no action '{flags.action}'")


def _delete(flags: Flags) -> bytes:
    from services.shim.ttrpc import ending

    bundle = flags.bundle or os.getcwd()
    ended = ending.read(bundle)
    if ended is None:
        from services.shim.ttrpc.cleanup import clean_up

        ended = clean_up(bundle, container_id=flags.id, namespace=flags.namespace)
    return ended.to_message()


def _in_words(error: Exception) -> str:
    return str(error) or type(error).__name__


if __name__ == "__main__":
    main()
