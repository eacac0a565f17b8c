"""Every benchmark runs to its table: one round, where its figures need several."""

import os
import re
import shlex

import programs
import pytest

SECS = 3000
COMMANDS = [
    "overhead.py",
    "epochs.py --only=time",
    "epochs.py --only=memory",
    "input.py",
    "recovery.py --only=checkpoints",
    "ps_embedding.py",
    "sync.py --only=mlp",
    "sync_less.py --only=link",
    "compression.py",
    "evaluator.py",
    "plan.py --only=100mbit",
]


@pytest.mark.everything
@pytest.mark.timeout(SECS)
@pytest.mark.parametrize("command", COMMANDS)
def test_benchmark_makes_its_table(command, tmp_path):
    name, *flags = shlex.split(command)
    if name in ("sync_less.py", "plan.py") and os.geteuid() != 0:
        pytest.skip(f"{command} needs root, for hosts of its own behind a narrow cable")
    table = tmp_path / "table.md"
    file = f"{programs.REPOSITORY}/benchmarks/{name}"
    done = programs.run([file, *flags, "--rounds=1", f"--write={table}"], timeout=SECS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", table.read_text(), re.MULTILINE)[2:]
    assert rows and all(re.search(r"\d", figure) for _, figure in rows), table.read_text()
