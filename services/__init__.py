"""The services of Theseus: ``daemon``, ``containerd``, ``shim``, and their client ``cli``.

They share the contracts in :mod:`protos` and the toolbox :mod:`services.common`, and never import
one another: each is deployed, restarted and upgraded on its own.
"""
