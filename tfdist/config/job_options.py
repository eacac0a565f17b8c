"""How the tasks of a job are kept alive and ended: the flags that `tfdist.train` and `tfdist.launch` have in common."""

from __future__ import annotations

import dataclasses

from tfdist.config.settings import setting

ELASTIC = ("restart", "in_process")
# What `tfdist.train`, whose tasks save their state and tell of their steps, has instead.
TRAIN_DEFAULTS = {"grace_secs": 30.0, "max_restarts": 3, "hang_timeout_secs": 600.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a launcher is told of any job.

    Args:
        grace_secs: How long tasks may take to end when they are asked to, before they are killed.
        max_restarts: How often, within `restart_window_secs`, tasks that were killed, froze or lost the others are
            started again: a ps job's worker alone, all tasks for any other. An exception is no reason: it would come
            again.
        restart_window_secs: Restarts that are longer ago are forgotten.
        hang_timeout_secs: A task that makes steps and then none for so long is taken for dead; 0 waits forever.
        rescale_every_secs: After so long with fewer workers all places are taken again, by way of a checkpoint; None:
            not before the next failure.
        elastic: `restart` starts all tasks again; `in_process` lets the living workers of a sync job form a new cluster
            at once, which the one that is started again joins later.
        chaos: Failures to make, as `tfdist.launcher.supervise.chaos` reads them.
        listen_interface: Network interface on which alone the servers on other machines listen, such as `eth0`; None:
            all.
        gpus_per_worker: How many of its host's each is given; 0: none; None: all of them are dealt out evenly.
    """

    grace_secs: float = setting(10.0, least=0, help="Seconds that tasks have to save and end after SIGTERM.")
    max_restarts: int = setting(0, least=0, help="How often tasks that were killed are started again.")
    restart_window_secs: float = setting(3600.0, least=0, help="Restarts that are longer ago do not count.")
    hang_timeout_secs: float = setting(
        0.0, least=0, help="A task without a step for so many seconds is taken for dead; 0: never."
    )
    rescale_every_secs: float | None = setting(
        None,
        least=0,
        help="With fewer workers, save and try all again after so many seconds. Default: at the next failure.",
    )
    elastic: str = setting(
        "restart", choices=ELASTIC, help="How a multiworker run goes on when a worker dies."
    )
    chaos: str = setting("", help="Failures to make, such as kill:worker:1@step=50,stop:ps:0@secs=20.")
    listen_interface: str | None = setting(
        None, help="Interface on which alone the hosts' servers listen, such as eth0. Default: all."
    )
    gpus_per_worker: int | None = setting(
        None, least=0, help="GPUs of its host for each worker, 0: none. Default: all, dealt out evenly."
    )
