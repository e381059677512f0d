"""The exit codes that hands used to docker expect."""

import signal

import pytest

from tests.integration.theseus import until

pytestmark = pytest.mark.root


def test_a_command_that_is_not_there_is_127(theseus, runtime):
    with theseus.leaves_nothing():
        result = theseus.run("--runtime", runtime, "--", "no-such-command")
    assert result.code == 127
    assert "no-such-command" in result.err and "(request " in result.err
    assert result.err.count("\n") == 1


def test_a_command_that_cannot_be_executed_is_126(theseus, runtime):
    with theseus.leaves_nothing():
        result = theseus.run("--runtime", runtime, "--", "/etc/passwd")
    assert result.code == 126
    assert "denied" in result.err


def test_a_directory_is_126(theseus, runtime):
    assert theseus.run("--runtime", runtime, "--", "/etc").code == 126


def test_exec_has_the_same_codes(theseus, runtime):
    theseus.start("--runtime", runtime, "--name", "ee", "--", "sleep", "60")
    with theseus.leaves_nothing():
        assert theseus("exec", "ee", "no-such-command").code == 127
        assert theseus("exec", "ee", "/etc/passwd").code == 126
        assert theseus("exec", "ee", "false").code == 1
    assert theseus.inspect("ee")["State"]["Status"] == "running"


def test_a_signal_is_128_and_its_number(theseus, runtime):
    result = theseus.run("--runtime", runtime, "--", "sh", "-c", "kill -USR1 $$")
    assert result.code == 0  # the kernel protects an init from signals it does not handle
    theseus.start("--runtime", runtime, "--name", "kk", "--", "sleep", "60")
    theseus.ok("kill", "kk")
    assert theseus.ok("wait", "kk") == "137"


def test_a_signal_to_the_command_reaches_the_container(theseus):
    script = "trap 'exit 21' INT; echo up; while :; do sleep 0.1; done"
    process = theseus.spawn("run", "--rm", theseus.image, "sh", "-c", script)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 21
    process.communicate()


def test_what_the_engine_refuses_is_125(theseus):
    with theseus.leaves_nothing():
        assert theseus.run("--memory", "1k", "--", "true").code == 125
        assert theseus.run("--wrong-flag", "--", "true").code == 125


def test_other_commands_fail_with_1(theseus):
    for command in ("start", "stop", "kill", "rm", "logs", "inspect", "wait", "rmi"):
        result = theseus(command, "no-such-thing")
        assert (result.code, result.out.strip()) in ((1, ""), (1, "[]")), (command, result)


def test_exec_in_a_container_that_does_not_run_fails(theseus):
    theseus.start("--name", "over", "--", "true")
    until(lambda: theseus.inspect("over")["State"]["Status"] == "exited")
    result = theseus("exec", "over", "true")
    assert result.code == 1
    assert "not running" in result.err
