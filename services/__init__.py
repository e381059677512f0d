"""The services of Theseus: ``daemon``, ``containerd``, ``shim``, and their client ``cli``.

They share the contracts in :mod:`protos` and the toolbox :mod:`services.common`, and never import
one another: each is deployed, restarted and upgraded on its own.
"""

import sys

# structlog takes it where another tool has brought it, for tracebacks in colours that nobody sees:
# a tenth of every start.
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # see importlib: not found
