"""`initialize`: a task joins its cluster, or serves it."""

from __future__ import annotations

import os

import keras
import tensorflow as tf

from tfdist.api.run import Run
from tfdist.api.run_state import RunState
from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.ports import check_reachable, meet_peers
from tfdist.cluster.spec import CLUSTER_STRATEGIES, Cluster, canonical_strategy, check_strategy
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.config.run_config import check_deterministic
from tfdist.config.settings import check_owner
from tfdist.errors import ConfigError
from tfdist.runtime.devices import configure_devices, take_gpus
from tfdist.runtime.server import isolate_server, prepare_server, serve
from tfdist.runtime.strategies import build_strategy


def initialize(
    *,
    strategy: str | None = None,
    num_replicas: int | None = None,
    seed: int = 0,
    cluster: Cluster | None = None,
    mixed_precision: str | None = None,
    start_timeout_secs: float = 300.0,
    gpu_memory_gb: float | None = None,
    deterministic: bool = False,
    pipeline: PipelineOptions | None = None,
) -> Run:
    """Joins the cluster and builds the strategy. Worker and ps tasks of a `ps` run serve here and never return.

    Args:
        strategy: `one_device`, `mirrored`, `multiworker`, `ps`, `pipeline` or an alias; None takes what the launcher
            was told, else `multiworker` in a cluster of workers, `ps` in one with ps tasks, `one_device` alone.
        num_replicas: Replicas of `mirrored`; None means every GPU, or two CPU replicas.
        seed: Seeds Python, NumPy, TensorFlow and Keras alike on every task.
        cluster: None reads it from the environment.
        mixed_precision: `bfloat16` or `float16` computes in it, with float32 variables.
        start_timeout_secs: Longest wait for the other tasks, in seconds; TensorFlow itself would wait for an hour.
        gpu_memory_gb: What this process may take of each GPU (10**9 bytes), where several replicas of `mirrored` share
            one each of them; None: what it needs.
        deterministic: Let TensorFlow run deterministic operations alone, so that the same program gives the same bits
            on GPUs too; steps are slower then, without XLA, and their times are not taken.
        pipeline: How models are divided under `pipeline`; None: into as many stages as there are workers.

    Returns:
        The run, on tasks that run the program.

    Raises:
        ConfigError: If the strategy does not fit the cluster.
        ClusterError: If this task's port is taken, or other tasks do not answer in time.

    Examples:
        >>> import tfdist
        >>> tfdist.initialize(strategy="one_device", seed=1).seed
        1
        >>> tfdist.initialize(strategy="multiworker")
        Traceback (most recent call last):
        tfdist.errors.ConfigError: strategy 'multiworker' needs a cluster, and this process is alone; start it with ...
    """
    cluster = cluster or detect_cluster(os.environ, strategy=strategy) or Cluster()
    name = canonical_strategy(strategy or os.environ.get("TFDIST_STRATEGY") or cluster.usual_strategy)
    options = pipeline or PipelineOptions()
    check_owner(options, name, owner="pipeline")
    if cluster.is_local and name in CLUSTER_STRATEGIES:
        raise ConfigError(
            f"strategy {name!r} needs a cluster, and this process is alone; start it with "
            f"'python -m tfdist.launch --strategy={name} --num_workers=2 your_script.py', or set TF_CONFIG."
        )
    check_strategy(cluster, name)
    check_deterministic(name, deterministic)
    if deterministic:
        tf.config.experimental.enable_op_determinism()
    take_gpus(cluster, name)
    if cluster.only_serves(name):
        serve(cluster, start_timeout_secs=start_timeout_secs)
    heartbeat = Heartbeat.from_environment(os.environ)
    prepare_server(cluster, name)
    configure_devices(strategy=name, num_replicas=num_replicas, gpu_memory_gb=gpu_memory_gb)
    keras.utils.set_random_seed(seed)
    if mixed_precision:
        keras.mixed_precision.set_dtype_policy(f"mixed_{mixed_precision}")
    if name in ("multiworker", "pipeline"):
        meet_peers(cluster, timeout_secs=start_timeout_secs)
    isolate_server(cluster)
    if name == "ps":
        servers = [t for t in cluster.tasks if t.type != "chief"]
        check_reachable(cluster, timeout_secs=start_timeout_secs, tasks=servers)
    built = build_strategy(strategy=name, cluster=cluster, num_replicas=num_replicas)
    state = RunState(
        strategy=built, strategy_name=name, cluster=cluster, seed=seed, heartbeat=heartbeat, pipeline=options
    )
    return Run(state)
