"""The cases in the order in which they are measured."""

from __future__ import annotations

from tools.bench.cases.command_line import COMMAND_LINE
from tools.bench.cases.crowd import CROWD
from tools.bench.cases.durability import DURABILITY
from tools.bench.cases.journal import JOURNAL
from tools.bench.cases.layers import LAYERS
from tools.bench.cases.logs import LOGS
from tools.bench.cases.memory import MEMORY
from tools.bench.cases.pull import PULL
from tools.bench.cases.rate import RATE
from tools.bench.cases.records import RECORDS
from tools.bench.cases.recovery import RECOVERY
from tools.bench.cases.run import RUN
from tools.bench.cases.starts import STARTS
from tools.bench.cases.steps import STEPS

CASES = (
    RUN,
    STEPS,
    RATE,
    MEMORY,
    PULL,
    LOGS,
    RECORDS,
    STARTS,
    COMMAND_LINE,
    RECOVERY,
    CROWD,
    JOURNAL,
    LAYERS,
    DURABILITY,
)
