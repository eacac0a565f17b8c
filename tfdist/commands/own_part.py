"""What a process of `tfdist.train` does itself: its task of a cluster, or the whole run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from tfdist.cluster.spec import Cluster, check_strategy
from tfdist.commands.flags import build_config
from tfdist.commands.run_report import reporting
from tfdist.launcher.job import ONEDNN
from tfdist.launcher.process.fork import quiet_imports
from tfdist.recipe import load_recipe


def run_own_part(fields: Mapping[str, Any], cluster: Cluster | None) -> None:
    """Runs the program, or serves those that do.

    Args:
        fields: Of the run's config.
        cluster: Of which this process is a task; None: of none.

    Raises:
        TfdistError: What `commands.execute.execute` raises.
    """
    for name, value in ({"TF_CPP_MIN_LOG_LEVEL": "3"} | ONEDNN).items():
        os.environ.setdefault(name, value)
    if cluster is not None and cluster.only_serves(fields["strategy"]):
        build_config(fields, None)  # The recipe is the chief's alone.
        _serve(cluster)
    with quiet_imports():
        # Here: TensorFlow takes seconds to import, and a mistake above should not wait for it.
        from tfdist.commands.execute import execute
    config = build_config(fields, load_recipe(fields["recipe"]))
    # A launcher writes the page when all have ended.
    reports = "TFDIST_LAUNCHED" not in os.environ and (cluster is None or cluster.is_chief)
    with reporting(config, keeps_error=True) if reports else contextlib.nullcontext():
        execute(config, cluster=cluster, say=lambda line: print(line, flush=True))


def _serve(cluster: Cluster) -> NoReturn:
    check_strategy(cluster, "ps")
    if importlib.util.find_spec("tf_keras") is None:
        # TensorFlow imports Keras on its own, and that scikit-learn: a second and 90 MB that a server has no use for.
        # With this it looks for the package that is not there, and goes on without.
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
    with quiet_imports():
        # Here, as the variable above must come first.
        from tfdist.runtime.server import serve
    serve(cluster)
