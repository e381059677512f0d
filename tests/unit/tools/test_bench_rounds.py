import contextlib

from tools.bench.bench import Bench, in_words
from tools.bench.figures import Quantity, Role, Subject
from tools.bench.rounds import Trial, interleave
from tools.bench.scale import QUICK

A, B = Subject("a", Role.OURS), Subject("b", Role.PEER)
WHAT = Quantity("case", "what")


def bench():
    said = []
    made = Bench(QUICK, stage=None, pictures=None, say=said.append)
    made.case = "case"
    return made, said


def trial(subject, log, *, fails_at=None):
    async def once(watch):
        log.append(subject.name)
        if fails_at is not None and log.count(subject.name) > fails_at:
            raise RuntimeError("it is broken\nin two lines")
        with watch(WHAT):
            pass

    return Trial(subject, once, "trial")


async def test_rounds_are_interleaved_in_turns_and_the_first_does_not_count():
    made, _ = bench()
    log = []

    await interleave(made, [trial(A, log), trial(B, log)], rounds=2)

    assert log == ["a", "b", "b", "a", "a", "b"]
    assert {f.subject: len(f.samples) for f in made.figures} == {A: 2, B: 2}


async def test_without_a_warm_up_every_round_counts():
    made, _ = bench()
    log = []

    await interleave(made, [trial(A, log)], rounds=2, warm=False)

    assert len(log) == 2
    assert [len(f.samples) for f in made.figures] == [2]


async def test_one_that_fails_is_named_and_not_tried_again():
    made, said = bench()
    log = []

    await interleave(made, [trial(A, log, fails_at=1), trial(B, log)], rounds=3)

    assert log.count("a") == 2
    assert [f.subject for f in made.figures] == [B]
    (failure,) = made.failures
    assert failure.subject == A
    assert failure.what == "case trial"
    assert failure.reason == "RuntimeError: it is broken in two lines"
    assert said == ["  a: RuntimeError: it is broken in two lines"]


async def test_an_interruption_is_not_a_failure():
    made, _ = bench()

    with contextlib.suppress(KeyboardInterrupt), made.forgiving(A):
        raise KeyboardInterrupt

    assert made.failures == []


def test_of_errors_that_came_together_the_first_is_told():
    inner = ExceptionGroup("some", [ValueError("the\n reason"), OSError()])

    assert in_words(ExceptionGroup("outer", [inner])) == "ValueError: the reason"
