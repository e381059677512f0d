"""The same `ctr` script against our containerd and against Debian's own: the same results.

What was compared is a table at the end of the tests' output (see conftest.py). Each containerd has
a directory of its own. One runs after the other: `ctr` names cgroups by namespace and id only.
"""

import asyncio
import contextlib
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from tests.fakes.containerd import ContainerdProcess, node_directory
from tests.fakes.stock_shim import kill_processes_of
from tests.integration.ctr_commands import END, SCRIPT
from tests.integration.ctr_script import COMPARED, Player, Result, Step
from tests.integration.test_stock_containerd import Stock
from tools import image, leaks

pytestmark = pytest.mark.root

EVENTS_S = 15


@pytest.fixture(scope="module")
def made(registry_address):
    second = image.tar_layer([(image.entry("second"), b"2")])
    built = image.build([image.busybox_layer({"etc/inner": b"text"}), second])
    image.push(built, registry_address, "cmp", "1")
    return built


@pytest.fixture
def places(made, registry_address, tmp_path):
    """Gives the {names} of the script, with files of their own for each containerd."""

    def prepare(name, node):
        scratch = tmp_path / name
        for directory in ("mounted", "t", "rootfs/bin"):
            (scratch / directory).mkdir(parents=True)
        shutil.copy(image.BUSYBOX, scratch / "rootfs/bin/echo")
        (scratch / "env").write_text("FROM=file\n")
        (scratch / "garbage.tar").write_text("no archive")
        (scratch / "editor").write_text("#!/bin/sh\necho edited > $1\n")
        (scratch / "editor").chmod(0o755)
        image.write_docker_archive(made, scratch / "docker.tar", "docker.io/library/docker:1")
        diffs = " ".join(image.digest_of(layer) for layer in made.layers)
        return {
            "image": f"{registry_address}/cmp:1",
            "registry": registry_address,
            "scratch": scratch,
            "editor": scratch / "editor",
            "manifest": made.digest,
            "config": image.digest_of(made.config),
            "words": image.digest_of(b"some words"),
            "nodigest": image.digest_of(b"nothing"),
            "chain": image.digest_of(diffs.encode()),
            "node": node,
        }

    return prepare


class Events:
    """`ctr events` in the background."""

    def __init__(self, player, *filters):
        self._player = player
        self._process = subprocess.Popen(
            [*player.command, "events", *filters], stdout=subprocess.PIPE, text=True
        )
        self._lines = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with self._process.stdout as stream:
            for line in stream:
                self._lines.put(line)

    def wait_until_it_listens(self):
        """Make events until one of them is heard."""
        for number in range(50):
            self._player.play(Step(f"namespaces label a number={number}"))
            with contextlib.suppress(queue.Empty):
                while f'"number":"{number}"' not in self._lines.get(timeout=0.1):
                    pass
                return
        raise AssertionError("no event was heard")

    def until(self, text):
        """Topics and fields up to an event that has ``text`` in it."""
        found = []
        while True:
            line = self._lines.get(timeout=EVENTS_S)
            *_, namespace, topic, message = line.split(" ", 6)
            found.append((namespace, topic, json.loads(message)))
            if text in line:
                return found

    def close(self):
        self._process.terminate()
        self._process.wait(10)
        self._reader.join(10)


def play(address, names):
    """Results of the whole script, and last what `ctr events` said of one container."""
    player = Player(address, names)
    script, end = SCRIPT[: -len(END)], END
    results = [player.play(step) for step in script]
    with (
        contextlib.closing(Events(player)) as all_events,
        contextlib.closing(
            Events(player, 'topic=="/tasks/exit"', 'topic~="/namespaces/update"')
        ) as exits,
    ):
        for listener in (all_events, exits):
            listener.wait_until_it_listens()
        ran = Step("run --rm {image} told sh -c", "exit 3")
        assert player.play(ran).code == 3
        told = all_events.until("/snapshot/remove")
        ended = [event for event in exits.until("told") if event[1] == "/tasks/exit"]
    text = "\n".join(
        f"{namespace} {topic} {sorted(message)}"
        for namespace, topic, message in told
        if topic != "/namespaces/update"
    )
    text += f"\n{[(topic, message['exit_status']) for _, topic, message in ended]}"
    return [*results, *(player.play(step) for step in end), Result(0, text)]


@pytest.mark.timeout(200)  # 300 commands, twice
async def test_a_stock_ctr_cannot_tell_the_difference(places, made, request):
    before = leaks.taken()
    directory = Path(tempfile.mkdtemp(prefix="thsc", dir="/tmp"))
    stock = Stock(directory)
    stock.start()
    try:
        theirs = await asyncio.to_thread(play, stock.address, places("stock", directory))
    finally:
        stock.stop()
        kill_processes_of(stock.address)
        shutil.rmtree(directory)
        leaks.clear(before)
    async with node_directory() as directory, ContainerdProcess(directory) as running:
        ours = await asyncio.to_thread(play, running.address, places("ours", directory))
        assert await running.stop() == 0
    leaks.clear(before)
    compared = list(zip([*SCRIPT, Step("events")], ours, theirs, strict=True))
    request.config.stash[COMPARED] = compared
    wrong = [
        f"ctr {step.title}\n  Debian's: {their}\n  ours:     {our}\n  meant: {step.differs or 'no'}"
        for step, our, their in compared
        if (our != their) != bool(step.differs)
    ]
    assert not wrong, "\n".join(wrong)
