"""What came of each failure, kept in a file of its own until all are known, and the table that is made of them."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = """# Reliability

Every task of a local cluster, killed, frozen or told to go at every kind of moment, in real processes. Each run ended
with the right weights (`multiworker`: bit for bit those of an undisturbed run) or, under asynchronous `ps`, with every
example counted once in every epoch, and with no process left. The number is the time in seconds from the failure until
training went on (or the task was back); `143` is a run that saved its state and left with that code, and ended right
when it was resumed; `done` is a run that was over before the failure could matter.

    python -m pytest tests/chaos --everything

"""


def _folder(config):
    return Path(config.cache.mkdir("failures"))


@pytest.fixture
def record_outcome(request):
    def record(*key_and_outcome):
        name = "-".join(key_and_outcome[:-1]).replace(" ", "_").replace(":", "_")
        (_folder(request.config) / f"{name}.json").write_text(json.dumps(key_and_outcome))

    return record


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput") or not session.config.getoption("--everything"):
        return
    from test_chaos import ACTIONS, ALL, MOMENTS, TASKS  # inside: only this run needs the tests' own tables

    found = [json.loads(path.read_text()) for path in _folder(session.config).iterdir()]
    outcomes = {tuple(key): outcome for *key, outcome in found}
    if len(outcomes) < len(ALL):
        return  # stopped, or other tests were chosen
    lines = [
        HEAD,
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}.\n\n",
    ]
    lines.append("| strategy | task | failure | " + " | ".join(MOMENTS.values()) + " |\n")
    lines.append("|---" * (3 + len(MOMENTS)) + "|\n")
    for strategy, tasks in TASKS.items():
        for task in tasks:
            for action in ACTIONS.values():
                cells = [outcomes[strategy, action, task, moment] for moment in MOMENTS.values()]
                lines.append("| " + " | ".join([strategy, task, action, *cells]) + " |\n")
    TABLE.write_text("".join(lines))
