"""The daemon's database, ``<root>/daemon.db``: the only code with SQL in it."""
