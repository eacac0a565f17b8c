"""A state of 3 GB is saved and comes back on every worker: more than one message or an int32 holds."""

import large_state
import numpy as np
import programs
import pytest

from tfdist.launcher.process.memory import read_available_bytes

pytestmark = [pytest.mark.conformance, pytest.mark.cluster, pytest.mark.everything, pytest.mark.timeout(1500)]
NEEDED_BYTES = 20e9


def test_state_of_3_gb_is_resumed_by_two_workers(tmp_path):
    if (read_available_bytes() or NEEDED_BYTES) < NEEDED_BYTES:
        pytest.skip(f"two workers with 3 GB each need {NEEDED_BYTES / 1e9:.0f} GB of memory")
    launch = ["-m", "tfdist.launch", "--preload", "--strategy=multiworker", "--num_workers=2"]
    for num_epochs in (1, 2):
        out = tmp_path / f"out-{num_epochs}"
        done = programs.run(
            [*launch, large_state.__file__, out, "multiworker", tmp_path / "checkpoints"], timeout=700
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (file,) = (tmp_path / "checkpoints").glob("epoch-*.npz")
        assert file.stat().st_size > 3e9
        for rank in range(2):
            found = dict(np.load(f"{out}-{rank}.npz"))
            assert found.pop("steps") == 2 * num_epochs
            marks = {f"{place}/{row}": mark for (place, row), mark in large_state.MARKS.items()}
            assert {name: set(ends) for name, ends in found.items()} == {
                **{name: {mark} for name, mark in marks.items()},
                "2/998": {0},
            }
