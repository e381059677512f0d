"""Parts of containerd that few calls need: each is imported, and built, for the first of them.

A node that runs containers and pulls nothing never has the code of a pull in memory, and a start
does not wait for its import.
"""
