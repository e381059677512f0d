"""Command lines as docker's users write them."""

import pytest

from services.cli.commands import ENTRIES
from services.cli.container_options import add_options, container_config
from services.cli.parser import Parser, UsageError


@pytest.fixture
def run():
    parser = Parser("theseus run", "[OPTIONS] IMAGE [COMMAND]", "Run")
    add_options(parser)
    return parser


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("busybox", ["busybox"]),
        ("-it busybox -it", ["busybox", "-it"]),
        ("--name x busybox --name y -- z", ["busybox", "--name", "y", "--", "z"]),
        ("-- busybox -x", ["busybox", "-x"]),
        ("-e A=1 -eB busybox ls -la --unknown", ["busybox", "ls", "-la", "--unknown"]),
        ("-m=64m busybox -h", ["busybox", "-h"]),
        ("--memory=64m busybox --help", ["busybox", "--help"]),
    ],
)
def test_options_end_at_the_image(run, line, words):
    assert run.parse(line.split()).words == words


def test_short_options_combine(run):
    options = run.parse(["-itu", "5", "-p80", "busybox"])
    assert options.interactive and options.tty
    assert (options.user, options.publish) == ("5", ["80"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "'theseus run' requires at least 1 argument"),
        ("--nam x busybox", "unknown flag: --nam"),
        ("-Z busybox", "unknown flag: -Z"),
        ("busybox", None),
        ("--name", "invalid argument for --name: a value is missing"),
        ("--pull sometimes x", "invalid argument for --pull: invalid choice"),
    ],
)
def test_wrong_lines(run, line, message):
    if message is None:
        run.parse(line.split())
        return
    with pytest.raises(UsageError) as caught:
        run.parse(line.split())
    assert str(caught.value).startswith(message)
    assert "See 'theseus run --help'" in caught.value.hint


def test_options_may_follow_words_elsewhere():
    parser = Parser("theseus rm", "", "")
    parser.flag("-f", "--force", help="")
    parser.words("names", at_least=1, at_most=2)
    options = parser.parse(["a", "-f", "b"])
    assert (options.names, options.force) == (["a", "b"], True)
    with pytest.raises(UsageError, match="accepts at most 2 arguments"):
        parser.parse(["a", "b", "c"])


@pytest.mark.parametrize("option", ["--pids-limit=99999999999999999999", "--cpus=1e30", "-m=9e9t"])
def test_numbers_past_64_bits_are_usage_errors(run, option):
    with pytest.raises(UsageError):
        container_config(run.parse([option, "busybox"]))


def test_an_empty_entrypoint_takes_the_images_away(run):
    assert list(container_config(run.parse(["busybox"])).entrypoint) == []
    assert list(container_config(run.parse(["--entrypoint", "", "busybox"])).entrypoint) == [""]


@pytest.mark.parametrize("name", ENTRIES)
def test_every_command_exists_and_helps(name, capsys):
    from importlib import import_module

    entry = ENTRIES[name]
    command = import_module(entry.module).COMMANDS[name]
    parser = Parser(f"theseus {name}", entry.usage, entry.summary)
    command.arguments(parser)
    if name == "volume":
        return
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: theseus {name}")
