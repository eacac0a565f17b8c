"""Where a process of `tfdist.train` finds itself: alone, or one of a cluster that somebody else has started."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from absl import flags

from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.spec import CLUSTER_STRATEGIES, EVALUATOR, Cluster, render_tf_config
from tfdist.commands.flags import resolve_run
from tfdist.config.run_dir import RunDir

# How long the one who evaluates it waits for a run.
_RUN_BEGINS_SECS = 600.0
_TELL_SECS = 2.0
# How long the others wait for the chief to say what is wrong, and to be ended for it.
_CHIEF_SPEAKS_FIRST_SECS = 20.0


def settle_place(values: flags.FlagValues) -> tuple[Cluster | None, dict[str, Any]]:
    """Returns the cluster that this process is a part of, and what is known of the run.

    Raises:
        ConfigError: If flags, environment and an earlier run do not go together.
    """
    cluster = None
    if values.mode != "follow":  # who does is nobody's peer, wherever it was started
        cluster = detect_cluster(os.environ, strategy=values.strategy, num_ps=values.num_ps)
    if cluster is not None and cluster.task is not None and cluster.task.type == EVALUATOR:
        values["mode"].value = "follow"
    if values.mode == "follow":
        _wait_for_run(values.run_dir or os.environ.get("TFDIST_RUN_DIR"))
        return None, resolve_run(values, None, os.environ)
    fields = resolve_run(values, cluster, os.environ)
    if cluster is not None:
        # Again: an earlier run's strategy may be what deals the roles.
        cluster = detect_cluster(os.environ, strategy=fields["strategy"], num_ps=fields["num_ps"])
        fields |= _count_tasks(cluster, fields["strategy"])
    return cluster, fields


def render_place(cluster: Cluster | None) -> str:
    """Says what a dry run finds."""
    if cluster is None or cluster.task is None:
        return "# nothing to start: this process runs it alone"
    return f"# nothing to start: this process is {cluster.task}\nTF_CONFIG={render_tf_config(cluster)}"


def let_the_chief_speak(cluster: Cluster | None) -> None:
    """Of several launched tasks that make the same mistake one says so: the launcher ends the others meanwhile."""
    if "TFDIST_LAUNCHED" in os.environ and cluster is not None and not cluster.is_chief:
        time.sleep(_CHIEF_SPEAKS_FIRST_SECS)


def _wait_for_run(folder: str | None) -> None:
    """Waits for a run that begins at the same time elsewhere; of none the one who asks for it says so."""
    start, has_said = time.monotonic(), False
    while folder and not RunDir(Path(folder)).config_file.exists():
        waited_secs = time.monotonic() - start
        if waited_secs > _RUN_BEGINS_SECS:
            return
        if waited_secs > _TELL_SECS and not has_said:
            print(f"evaluator: waiting for a run in {folder}, which is not there yet", flush=True)
            has_said = True
        time.sleep(0.2)


def _count_tasks(cluster: Cluster | None, strategy: str) -> dict[str, int]:
    """Returns how many there are, for a config that shall tell the truth; the launcher has told those it started."""
    if cluster is None or strategy not in CLUSTER_STRATEGIES or "TFDIST_LAUNCHED" in os.environ:
        return {}
    return {"num_workers": (cluster.num_workers if strategy == "ps" else len(cluster.tasks)) or 1}
