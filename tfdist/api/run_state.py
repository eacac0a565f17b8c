"""Where a run takes place, and what it keeps from one call to the next."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from tfdist.api.loops import Loops
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.membership import Membership
from tfdist.cluster.spec import Cluster
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.data.read_errors import readable_faults
from tfdist.errors import PeerLost, Regroup
from tfdist.runtime.strategies import StagedStrategy, is_peer_loss, wait_for_workers
from tfdist.training.checkpoint.snapshot import Snapshot
from tfdist.training.privacy.accountant import Spent


@dataclasses.dataclass(kw_only=True)
class RunState:
    """What the calls of a `Run` share.

    Attributes:
        strategy: The run's.
        strategy_name: Its canonical name.
        cluster: Of the run.
        seed: Of the order of the data.
        heartbeat: Is told of each step.
        pipeline: How models are divided under `pipeline`.
        members: Of the run's cluster, where that may change in mid-training.
        carried: The state that this process has brought along from an earlier cluster.
        spent: What models were trained with privately.
    """

    strategy: tf.distribute.Strategy | StagedStrategy
    strategy_name: str
    cluster: Cluster
    seed: int
    heartbeat: Heartbeat
    pipeline: PipelineOptions
    members: Membership | None = None
    carried: Snapshot | None = None
    spent: weakref.WeakKeyDictionary[keras.Model, Sequence[Spent]] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary
    )

    def __post_init__(self) -> None:
        self.loops = Loops(
            strategy=self.strategy,
            strategy_name=self.strategy_name,
            cluster=self.cluster,
            pipeline=self.pipeline,
            heartbeat=self.heartbeat,
        )

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Steps follow each other inside; if others are gone, a step ends this task too, else all leave together."""
        is_regrouping = False
        try:
            with readable_faults():
                yield
        except Regroup:
            # In another cluster. The launcher, which may see a peer's death later than we, must not find us resting.
            is_regrouping = True
            raise
        except tf.errors.OpError as error:
            if not is_peer_loss(error) or self.cluster.is_single:
                raise
            print("tfdist: other tasks are gone in the middle of a step", file=sys.stderr, flush=True)
            raise PeerLost from error
        finally:
            if not is_regrouping:
                self.heartbeat.rest()
        wait_for_workers(self.strategy)
