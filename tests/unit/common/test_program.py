"""How the program of a tier runs."""

import os
import subprocess
import sys

_CODE = """
import os
from services.common import program
program.import_grpc()
import grpc
assert os.environ.get("GRPC_EXPERIMENTS") == {left!r}
grpc.insecure_channel("unix:/nowhere").close()
"""


def test_grpc_knows_how_it_is_to_read_sockets_and_children_do_not():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_")}
    done = subprocess.run(
        [sys.executable, "-c", _CODE.format(left=None)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # It speaks of experiments that it does not know.
    assert (done.returncode, done.stderr) == (0, "")


def test_what_the_environment_says_of_experiments_goes_first():
    own = "-event_engine_listener"
    done = subprocess.run(
        [sys.executable, "-c", _CODE.format(left=own)],
        env={**os.environ, "GRPC_EXPERIMENTS": own},
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
