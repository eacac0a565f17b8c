"""How much of the suite runs: by default a quarter of an hour, with `--ci` what CI runs, with `--everything` all."""

from pathlib import Path

import pytest

# Files that take more than a minute come first, so that at the end no worker waits for the other.
_LONG = (
    "test_generated.py",
    "test_exact.py",
    "test_slurm.py",
    "test_ssh.py",
    "test_mpi.py",
    "test_slurm_submit.py",
    "test_chaos.py",
    "test_elastic.py",
    "test_sync_ways.py",
    "test_nan_steps.py",
    "test_resume.py",
    "test_survival.py",
    "test_train_command.py",
    "test_tables.py",
    "test_promises.py",
    "test_ps_steps.py",
    "test_situations.py",
)


def rarely(values, *starts, ci=()):
    """Returns parameters, of which not all run by default.

    Args:
        values: Strings.
        starts: How those begin that run with `--everything` alone.
        ci: How those begin that run in CI too.
    """
    marks = ((starts, pytest.mark.everything), (tuple(ci), pytest.mark.ci))
    return [
        pytest.param(value, marks=[mark for words, mark in marks if value.startswith(words)])
        for value in values
    ]


def pytest_addoption(parser):
    parser.addoption(
        "--ci",
        action="store_true",
        help="also what CI runs: other hosts, Slurm and pods, more cases of what the others have an example of",
    )
    parser.addoption(
        "--everything",
        action="store_true",
        help="also what takes hours: every recipe to its metric, every failure at every moment, every benchmark; "
        "writes the tables of docs/. Started again after it was stopped, it goes on with what has not passed yet",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "ci: runs with --ci and --everything")
    config.addinivalue_line("markers", "everything: runs with --everything alone")
    config.pluginmanager.register(_Choice(config))


class _Choice:
    """Which tests run; with `--everything` a file remembers those that have passed."""

    def __init__(self, config):
        self._all = config.getoption("--everything")
        self._left_out = [] if self._all else ["everything"]
        if not (self._all or config.getoption("--ci")):
            self._left_out.append("ci")
        self._is_worker = hasattr(config, "workerinput")
        self._file = Path(config.cache.mkdir("everything")) / "passed" if self._all else None
        if self._is_worker:
            self._passed = set(config.workerinput["everything"])
        elif self._all and self._file.exists():
            self._passed = set(self._file.read_text().splitlines())
        else:
            self._passed = set()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        # All workers must choose the same tests, also one that is started late.
        node.workerinput["everything"] = sorted(self._passed)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        chosen, left_out = [], []
        for item in items:
            (left_out if self._leaves_out(item) else chosen).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = sorted(chosen, key=lambda item: item.path.name not in _LONG)

    def _leaves_out(self, item):
        return item.nodeid in self._passed or any(item.get_closest_marker(name) for name in self._left_out)

    def pytest_runtest_logreport(self, report):
        if self._all and not self._is_worker and report.when == "call" and report.passed:
            with self._file.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, exitstatus):
        if self._all and not self._is_worker and exitstatus == pytest.ExitCode.OK:
            self._file.unlink(missing_ok=True)
