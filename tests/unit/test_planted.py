"""The faults of tests/planted can still be planted."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "planted"))
import plant


def test_there_are_enough_in_enough_places():
    faults = plant.read_faults()
    assert len(faults) >= 40
    assert len({fault.place for fault in faults}) >= 25


@pytest.mark.parametrize("fault", plant.read_faults(), ids=lambda fault: fault.name)
def test_fault_applies_and_names_its_tests(fault):
    """A patch that the code has left behind would find nothing any more."""
    checked = ["git", "apply", "--check", str(fault.patch)]
    done = subprocess.run(checked, cwd=plant.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(fault.sentence) > 20 and fault.tests
    for test in fault.tests:
        assert (plant.REPOSITORY / test.partition("::")[0]).exists(), test
