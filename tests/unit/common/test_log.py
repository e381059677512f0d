"""Lines of the log: one JSON object each, with what the context knows."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import structlog

from services.common import log as logs
from services.common.log import request_id

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def configuration_is_restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logs.Logger.least = 0
    logging.basicConfig(force=True, handlers=[logging.NullHandler()])


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_has_tier_level_time_and_request(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("t", "info")
    token = request_id.set("abc")
    structlog.get_logger("a").info("thing done", key="x", path=object)
    request_id.reset(token)
    (line,) = lines(capsys)
    assert line["event"] == "thing done"
    assert (line["tier"], line["level"], line["request_id"], line["key"]) == (
        "t",
        "info",
        "abc",
        "x",
    )
    assert str(line["timestamp"]).endswith("Z")
    assert line["path"] == "<class 'object'>"


def test_levels_below_are_dropped_even_by_a_logger_that_spoke_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("t", "debug")
    log = structlog.get_logger("b")
    log.debug("one")
    logs.configure("t", "warning")
    log.info("two")
    log.bind(more=1).warning("three")
    assert [(line["event"], line.get("more")) for line in lines(capsys)] == [
        ("one", None),
        ("three", 1),
    ]


def test_failures_have_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("t")
    log = structlog.get_logger("c")
    try:
        raise ValueError("broken")
    except ValueError as error:
        log.exception("failed")
        log.error("failed again", exc_info=error)
    logging.getLogger("library").error("its words", exc_info=None)
    first, second, third = lines(capsys)
    assert "ValueError: broken" in str(first["exception"])
    assert first["exception"] == second["exception"]
    assert (third["message"], third["logger"]) == ("its words", "library")
