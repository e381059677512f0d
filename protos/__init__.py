"""The contracts between the services, and the stubs generated beside them.

The ``.proto`` files are the source; ``*_pb2.py`` (messages), ``*_pb2_grpc.py`` (services) and
their ``.pyi`` twins are written by ``tools/protos.py`` and never edited. They are compiled with the
repository root as include path, so a file's path, its import in another ``.proto`` and its Python
import agree: ``from protos.containerd.services.content.v1 import content_pb2``.

``theseus`` holds our own contracts. ``containerd`` and ``runtime`` are wire-compatible with
containerd and Kubernetes CRI: they keep upstream's package names, so type URLs and gRPC method
paths are the ones those clients expect, whatever folder the file lies in.
"""
