"""Which failures are made: a few, or, with `--all_failures`, every one; and the table of what came of them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

OUTCOMES = pytest.StashKey[dict]()
HEAD = """# Reliability

Every task of a local cluster, killed, frozen or told to go at every kind of moment, in real processes. Each run ended
with the right weights (`multiworker`: bit for bit those of an undisturbed run) or, under asynchronous `ps`, with every
example counted once in every epoch, and with no process left. The number is the time in seconds from the failure until
training went on (or the task was back); `143` is a run that saved its state and left with that code, and ended right
when it was resumed; `done` is a run that was over before the failure could matter.

    python -m pytest tests/chaos --all_failures --reliability=docs/reliability.md

"""


def pytest_configure(config):
    config.stash[OUTCOMES] = {}


@pytest.fixture
def record_outcome(request):
    def record(strategy, action, task, moment, outcome):
        request.config.stash[OUTCOMES][strategy, task, action, moment] = outcome

    return record


def pytest_sessionfinish(session):
    path, outcomes = session.config.getoption("--reliability"), session.config.stash[OUTCOMES]
    if not path or not outcomes:
        return
    moments = list(dict.fromkeys(key[3] for key in outcomes))
    lines = [HEAD, f"Python {platform.python_version()}, {os.cpu_count()} cores, shared with others.\n\n"]
    lines.append("| strategy | task | failure | " + " | ".join(moments) + " |\n")
    lines.append("|---" * (3 + len(moments)) + "|\n")
    for row in dict.fromkeys(key[:3] for key in outcomes):
        cells = [outcomes.get((*row, moment), "**failed**") for moment in moments]
        lines.append("| " + " | ".join([*row, *cells]) + " |\n")
    Path(path).write_text("".join(lines))
