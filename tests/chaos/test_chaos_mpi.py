"""Gradients that MPI carries are under the same supervision: a peer's death is got over, and nothing is left."""

import pytest
from test_chaos import (
    assert_each_example_counted_once,
    assert_equal_weights,
    assert_no_process_left,
    settings,
    train,
)

pytestmark = [pytest.mark.cluster, pytest.mark.ci]


def test_run_by_mpi_survives_a_peers_death(tmp_path):
    """The living wait inside MPI, where no exception reaches them: the launcher ends them."""
    pytest.importorskip("mpi4py", reason="needs the extra tfdist[mpi]")
    (tmp_path / "undisturbed").mkdir()
    flags = [*settings("multiworker"), "--exchange=mpi"]
    done = train(tmp_path / "undisturbed", *flags)
    assert done.returncode == 0, done.stderr
    (tmp_path / "killed").mkdir()
    done = train(tmp_path / "killed", *flags, "--chaos=kill:worker:1@step=45")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "starting all tasks again" in done.stderr
    assert_each_example_counted_once(tmp_path / "killed", "multiworker")
    assert_equal_weights(tmp_path / "killed", tmp_path / "undisturbed")
    assert_no_process_left(tmp_path / "killed")
