"""A script of `ctr` commands, run against two containerds, and the form in which they are compared.

A step is one command line. What it printed is brought into a form without times, places and ids
that differ from run to run; then exit code and text have to be the same. A difference that is
meant is listed with its step and its reason, and has to be there.
"""

import io
import json
import os
import pty
import re
import subprocess
import tarfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import pytest

COMPARED = pytest.StashKey[list]()
"""(step, our result, theirs) of every step, for the summary of the tests."""

STEP_S = 30
UNTIL_S = 10


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: of the command line after `ctr`, in one string; {names} are filled in.
        last: one more word, which may have spaces.
        input: for its standard input.
        until: asked again until its output has this text.
        absent: and until it does not have this one.
        terminal: it runs on a terminal of its own, on which ``input`` is typed.
        view: what of its output is compared, instead of all.
        differs: why its result is not the same, where it is meant not to be.
        namespace: where.
    """

    words: str
    last: str = ""
    input: str = ""
    until: str = ""
    absent: str = ""
    terminal: bool = False
    view: object = None
    differs: str = ""
    namespace: str = "default"

    @property
    def command(self):
        """What is run, without what it is told."""
        first, *more = self.words.split()
        return f"{first} {more[0]}" if more and first.endswith("s") else first

    @property
    def title(self):
        return " ".join(f"{self.words} {self.last}".split())


@dataclass(frozen=True)
class Result:
    """Exit code and text of a command, in the form that is compared."""

    code: int
    text: str

    def __str__(self):
        return f"[{self.code}] {self.text}"


class Player:
    """Runs steps against one containerd.

    Args:
        address: its socket.
        places: the {names} of steps, and texts that stand for something of this run only.
    """

    def __init__(self, address, places):
        self.command = ["ctr", "--address", str(address)]
        self.places = places

    def play(self, step):
        words = [word.format(**self.places) for word in step.words.split()]
        if step.last:
            words.append(step.last.format(**self.places))
        command = [*self.command, "--namespace", step.namespace, *words]
        deadline = time.monotonic() + UNTIL_S
        while True:
            run = self._on_terminal if step.terminal else self._piped
            code, out, err = run(command, step.input)
            settled = step.until in out and not (step.absent and step.absent in out)
            if settled or time.monotonic() > deadline:
                break
        view = step.view or as_it_is
        return Result(code, self._without_places(view(out) + view_of_error(err)))

    def _piped(self, command, given):
        done = subprocess.run(
            command, input=given.encode(), capture_output=True, timeout=STEP_S, check=False
        )
        out, err = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
        return done.returncode, out, err

    def _on_terminal(self, command, given):
        master, slave = pty.openpty()
        process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        watchdog = threading.Timer(STEP_S, process.kill)
        watchdog.start()
        text = b""
        with suppress(OSError):
            if given:
                # What is typed before the container's terminal is there is typed for nobody.
                while b"# " not in text:
                    text += os.read(master, 4096)
                os.write(master, given.encode())
            while data := os.read(master, 4096):
                text += data
        watchdog.cancel()
        code = process.wait(STEP_S)
        os.close(master)
        return code, text.decode().replace("\r", ""), ""

    def _without_places(self, text):
        for name, place in sorted(self.places.items(), key=lambda item: -len(str(item[1]))):
            text = text.replace(str(place), f"<{name}>")
        for pattern, name in _VOLATILE:
            text = pattern.sub(name, text)
        return text


_VOLATILE = [
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"), "<time>"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+ \+\d{4} UTC"), "<time>"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\b\d+ (second|minute)s?\b|Less than a second|About a minute"), "<age>"),
    (re.compile(r"\bextract-\d+-\S+"), "<extraction>"),
    (re.compile(r"\b\d+(\.\d+)?(ms|s|µs)\b"), "<duration>"),
    (re.compile(r"elapsed: .*? s +total: .*"), "<progress>"),
    (re.compile(r"\b\d{6,}-[\w-]{4,8}(?= )"), "<generated>"),
    (re.compile(r"/run/containerd/fifo/\d+"), "<fifos>"),
    (re.compile(r"/tmp/containerd-mount\d+"), "<mount>"),
    (
        re.compile(r"<node>/root/(io.containerd.snapshotter.v1.(\w+)/snapshots|snapshots/\w+)/"),
        "<snapshots>/",
    ),
]
# How containerd's clients name the kinds of failure. What is said before it is the server's own.
_KINDS = (
    "already exists|not found|invalid argument|failed precondition|not implemented|unavailable|"
    "unknown|aborted|out of range"
)
_SAID = re.compile(rf"^ctr: (.*: )?(?P<kind>{_KINDS})$")


def as_it_is(text):
    """Line by line, columns apart by one space."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def view_of_error(text):
    """ctr's own words; of what the server said, the kind of failure."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("ctr:")]
    return "".join("\n! " + _SAID.sub(r"\g<kind>", line) for line in lines)


def rows(*columns):
    """These columns of a table, in order of their text."""

    def view(text):
        lines = [line.split() for line in text.splitlines() if line.strip()]
        kept = [" ".join(line[c] for c in columns if c < len(line)) for line in lines]
        return "\n".join(sorted(kept))

    return view


def words(text):
    """Words in order of their text, commas apart as well."""
    return " ".join(sorted(re.split(r"[\s,]+", text)))


def lines(text):
    """In order of their text, each with its words in order of theirs, commas apart as well."""
    return "\n".join(sorted(map(words, text.splitlines())))


def layer(text):
    """The names in a layer, compressed or not."""
    with tarfile.open(fileobj=io.BytesIO(text.encode(errors="surrogateescape"))) as archive:
        return " ".join(sorted(archive.getnames()))


def last_line(text):
    return as_it_is("\n".join(text.splitlines()[-1:]))


def keys(text):
    """The names of a JSON document's fields, however deep."""

    def walk(value):
        if isinstance(value, dict):
            return {key: walk(value[key]) for key in sorted(value)}
        if isinstance(value, list):
            return [walk(item) for item in value[:1]]
        return type(value).__name__

    return json.dumps(walk(json.loads(text)))


def sections(text):
    """The messages of a JSON document, however deep, without their numbers: those may be 0."""

    def walk(value):
        return {key: walk(item) for key, item in sorted(value.items()) if isinstance(item, dict)}

    return json.dumps(walk(json.loads(text)))
