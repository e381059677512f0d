"""Where the shim's own process belongs: the cgroup that runtime options name for it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def enter_cgroup(path: str, root: Path = ROOT) -> list[str]:
    """Move this process into ``path`` below every hierarchy that has it.

    Returns:
        What could not be done, in words; a shim works in any cgroup.
    """
    relative = path.strip("/")
    if (root / "cgroup.controllers").exists():
        directories = [root / relative]
    else:
        directories = [
            entry / relative
            for entry in sorted(root.iterdir())
            if not entry.is_symlink() and (entry / relative / "cgroup.procs").exists()
        ]
    failures = [] if directories else [f"there is no cgroup {path}"]
    for directory in directories:
        try:
            (directory / "cgroup.procs").write_text("0")
        except OSError as error:
            failures.append(f"cgroup {directory} cannot be entered: {error.strerror}")
    return failures
