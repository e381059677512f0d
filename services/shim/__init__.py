"""The shim: parent, stdio holder and exit recorder of one container. Start at ``app.py``."""
