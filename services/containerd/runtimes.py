"""Names of the runtimes that our own shim is for; tasks/foreign.py has all others."""

OUR_RUNTIMES = (
    "io.containerd.runc.v2",
    "io.containerd.runtime.v1.linux",
    "io.containerd.theseus.v1",
)
