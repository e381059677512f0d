"""Tasks: bundles, the shims that run them, and what is promised about both.

Begin with :mod:`.shim` (what a shim is to containerd), then :mod:`.shims` (which there are) and
:mod:`.keeper` (what becomes of silent and dead ones), then :mod:`.manager` (what clients ask for).
"""
