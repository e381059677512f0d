"""The ``theseus`` command: a client of the daemon like any other, with docker's vocabulary.

Start reading at :mod:`services.cli.__main__`. A command lives in ``commands/``; what it shares with
others lies beside: options that become messages, the session that couples a terminal with a process
and survives a restart of the daemon, tables, JSON.
"""
