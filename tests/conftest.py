"""Rules of the whole suite: who may run root tests, and that nothing is left behind."""

import os

import pytest

from tools import leaks, sandbox

_NOT_ROOT = "needs root: namespaces, mounts and an OCI runtime"
_NOT_IN_SANDBOX = (
    "root tests make containers, mounts and networks: run them with 'make test', which does it in "
    "namespaces of their own (or set THESEUS_TEST_HOST=1 to run them on this host)"
)
_BEFORE = pytest.StashKey[leaks.Traces]()
_LEFT = pytest.StashKey[list]()
_SEEN = pytest.StashKey[dict]()


def _is_root():
    return os.geteuid() == 0


def _in_sandbox():
    return sandbox.MARK in os.environ


def pytest_configure(config):
    os.environ["DOCKER_CONFIG"] = "/nonexistent"  # credentials of whoever runs this are not ours
    if _is_root() and _in_sandbox():
        config.stash[_BEFORE] = before = leaks.taken()
        config.stash[_SEEN] = dict.fromkeys(before.beyond(leaks.NOTHING), "before the tests")


def pytest_collection_modifyitems(items):
    if not _is_root():
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason=_NOT_ROOT))


def pytest_runtest_setup(item):
    if (
        item.get_closest_marker("root")
        and _is_root()
        and not _in_sandbox()
        and os.environ.get("THESEUS_TEST_HOST") != "1"
    ):
        pytest.fail(_NOT_IN_SANDBOX, pytrace=False)


def pytest_runtest_teardown(item, nextitem):
    """Notes after which file a trace was first there, to say whose it is if it stays."""
    seen = item.config.stash.get(_SEEN, None)
    if seen is not None and (nextitem is None or nextitem.path != item.path):
        for trace in leaks.taken().beyond(leaks.NOTHING):
            seen.setdefault(trace, f"since {item.path.name}")


def pytest_sessionfinish(session):
    before = session.config.stash.get(_BEFORE, None)
    if before is not None and not session.config.option.collectonly:
        session.config.stash[_LEFT] = left = leaks.left_since(before)
        if left and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    skipped = [
        report
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple) and _NOT_ROOT in report.longrepr[2]
    ]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests skipped: each {_NOT_ROOT}", yellow=True)
    left = config.stash.get(_LEFT, None)
    if left:
        terminalreporter.section("left behind", red=True)
        for line in left:
            since = config.stash[_SEEN].get(line, "since the end")
            terminalreporter.write_line(f"{line} ({since})", red=True)
    elif left is not None:
        terminalreporter.write_line("nothing was left behind", green=True)
