"""Measures Theseus beside its peers: same image, same runtime, same options, interleaved.

    make bench [QUICK=1] [ONLY=run,pull] [ARGS="--out DIR"]

Start reading at :mod:`.case` (what a case is) and :mod:`.cases` (which there are). A case asks
:class:`~.bench.Bench` for running :mod:`.engines`, times them in turns (:mod:`.rounds`) and leaves
:mod:`.figures`, of which :mod:`.report` makes tables, plots and ``benchmarks/RESULTS.md``.

Everything happens on a :mod:`.stage` of its own: private namespaces, a fresh ext4 for the root of
every engine, ``/run``, ``/etc`` and ``/var/lib`` that are thrown away. Nothing is left of it.
"""
