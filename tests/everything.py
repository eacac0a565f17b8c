"""`pytest --everything`: also the tests that take hours, which can be stopped and gone on with."""

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


def rarely(values, *starts):
    """Returns parameters, of which those that begin with one of some words run with `--everything` alone."""
    return [
        pytest.param(value, marks=pytest.mark.everything if value.startswith(starts) else ())
        for value in values
    ]


def pytest_addoption(parser):
    parser.addoption(
        "--everything",
        action="store_true",
        help="also what takes hours: every recipe to its metric, every failure at every moment, every benchmark; "
        "writes the tables of docs/. Started again after it was stopped, it goes on with what has not passed yet",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "everything: runs with --everything alone")
    config.pluginmanager.register(_Choice(config))


class _Choice:
    """Which tests run; with `--everything` a file remembers those that have passed."""

    def __init__(self, config):
        self._all = config.getoption("--everything")
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
        is_rare = item.get_closest_marker("everything") is not None
        return item.nodeid in self._passed or (is_rare and not self._all)

    def pytest_runtest_logreport(self, report):
        if self._all and not self._is_worker and report.when == "call" and report.passed:
            with self._file.open("a") as file:
                file.write(f"{report.nodeid}\n")

    def pytest_sessionfinish(self, exitstatus):
        if self._all and not self._is_worker and exitstatus == pytest.ExitCode.OK:
            self._file.unlink(missing_ok=True)
