"""The shim under a stock containerd: ``containerd-shim-theseus-v1``, which speaks ttrpc.

No gRPC is imported here. What containerd waits for (``__main__``, ``flags``, ``bootstrap``,
``wire``, ``ending``) imports next to nothing, since every millisecond of it is one of ``ctr run``;
``app`` and what it builds is imported by the process that stays.
"""
