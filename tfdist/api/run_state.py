"""Where a run takes place, and what it keeps from one call to the next: a loop for each model, above all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfdist import keras_internals
from tfdist.api.checks import check_stages
from tfdist.cluster.heartbeat import Heartbeat
from tfdist.cluster.membership import Membership
from tfdist.cluster.spec import Cluster
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.data.read_errors import readable_faults
from tfdist.data.sources.source import Source
from tfdist.errors import ConfigError, PeerLost, Regroup
from tfdist.layers import Embedding
from tfdist.optimizers import describe_dense_rows, with_sparse_rows
from tfdist.runtime.strategies import StagedStrategy, is_peer_loss, wait_for_workers
from tfdist.training.checkpoint.snapshot import Snapshot
from tfdist.training.first_batch import check_elements, read_first_batch
from tfdist.training.model_loop import Loop
from tfdist.training.pipeline.loop import PipelineLoop
from tfdist.training.privacy.accountant import Spent
from tfdist.training.ps.loop import CoordinatorLoop
from tfdist.training.sync.loop import SyncLoop

_log = logging.getLogger("tfdist")
# A smaller table costs no time to speak of, whatever the optimizer does to it.
_MANY_ROWS = 100_000
# Models whose functions are kept: those of a run that takes turns.
_MAX_LOOPS = 8


@dataclasses.dataclass(kw_only=True)
class RunState:
    """What the calls of a `Run` share.

    A model's loop is made when the model is first seen, and again when it is compiled anew.

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
    _kept: dict[int, tuple[Any, Loop]] = dataclasses.field(default_factory=dict, init=False)
    _coordinator: tf.distribute.coordinator.ClusterCoordinator | None = dataclasses.field(
        default=None, init=False
    )

    def find_loop(self, model: keras.Model, source: Source, *, is_trained: bool = True) -> Loop:
        """Returns the loop of a model, whose variables exist from then on.

        Args:
            model: Made inside the strategy's scope.
            source: Data for it; two examples are read where the model is new.
            is_trained: Whether it must be compiled.

        Raises:
            ConfigError: If the model is not compiled, was made elsewhere, or does not take such data.
        """
        if is_trained and not keras_internals.is_compiled(model):
            raise ConfigError(
                f"the model {model.name!r} is not compiled; call model.compile(optimizer=…, loss=…) inside "
                "run.strategy.scope() first."
            )
        if self.strategy_name == "pipeline":
            is_trained = keras_internals.is_compiled(model)
            check_stages([source])
        self.check_elements(model, source)
        known = self._kept.pop(id(model), None)
        # compile() makes new state that an old loop would not see.
        parts = (*keras_internals.compiled_parts(model), is_trained or (known is not None and known[0][-1]))
        if known is not None and all(a is b for a, b in zip(known[0], parts, strict=True)):
            self._kept[id(model)] = known
            return known[1]
        is_staged = isinstance(self.strategy, StagedStrategy)
        num_parts = self.strategy.num_replicas_in_sync
        if is_staged:
            num_parts = self.pipeline.layout(self.cluster.num_workers).num_micro_batches
        batch = read_first_batch(model, source, strategy=self.strategy_name, num_replicas=num_parts)
        self._check_scope(model)
        if not is_staged:  # a loop of stages builds its own
            with self.strategy.scope():
                keras_internals.build_model(model, batch, is_trained=is_trained)
        _use_sparse_rows(model, warn=_log.warning if self.cluster.is_chief else _log.debug)
        loop = self._build(model, batch)
        # A loop holds its model, so that an id stands for one model only. The latest last.
        self._kept[id(model)] = ((*keras_internals.compiled_parts(model), is_trained), loop)
        while len(self._kept) > _MAX_LOOPS:
            self._kept.pop(next(iter(self._kept)))
        return loop

    def check_elements(self, model: keras.Model, source: Source) -> None:
        """Makes sure that a stream's elements are what the model takes, as far as their shapes tell."""
        check_elements(model, source, shares=self.strategy_name in ("mirrored", "multiworker", "pipeline"))

    def _build(self, model: keras.Model, batch: Any) -> Loop:
        if isinstance(self.strategy, StagedStrategy):
            return PipelineLoop(
                strategy=self.strategy,
                model=model,
                cluster=self.cluster,
                options=self.pipeline,
                heartbeat=self.heartbeat,
                batch=batch,
            )
        if self.strategy_name != "ps":
            return SyncLoop(strategy=self.strategy, model=model, heartbeat=self.heartbeat, batch=batch)
        if self._coordinator is None:
            self._coordinator = tf.distribute.coordinator.ClusterCoordinator(self.strategy)
        return CoordinatorLoop(
            coordinator=self._coordinator,
            model=model,
            num_workers=self.cluster.num_workers,
            heartbeat=self.heartbeat,
            batch=batch,
        )

    def _check_scope(self, model: keras.Model) -> None:
        if self.strategy_name == "one_device":
            return
        if isinstance(self.strategy, StagedStrategy):
            if not all(map(keras_internals.was_deferred, model.weights)):
                raise ConfigError(
                    f"the model {model.name!r} was made outside the strategy's scope, whole in this process; build and "
                    "compile it inside 'with run.strategy.scope():'."
                )
            return
        if keras_internals.creating_strategy(model) is not self.strategy:
            raise ConfigError(
                f"the model {model.name!r} was made outside the strategy's scope; "
                "build and compile it inside 'with run.strategy.scope():'."
            )
        if not keras_internals.is_compiled_within(model, self.strategy):
            raise ConfigError(
                f"the model {model.name!r} was compiled outside the strategy's scope, where its optimizer and metrics "
                "have no copy for each replica; call model.compile(…) inside 'with run.strategy.scope():'."
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


def _use_sparse_rows(model: keras.Model, *, warn: Callable[..., None]) -> None:
    """Spares a model's large tables what Keras's optimizers do to all of their rows, where the result is the same.

    Other models keep Keras's classes: their Adagrad counts a row that occurs twice in a batch twice, and so shall we.
    """
    if tables := keras_internals.find_layers(model, Embedding):
        largest = max(tables, key=lambda table: table.input_dim)
        for optimizer in keras_internals.find_optimizers(model):
            what = describe_dense_rows(with_sparse_rows(optimizer))
            if what is not None and largest.input_dim >= _MANY_ROWS:
                warn("%r has %d rows, and %s", largest.name, largest.input_dim, what)
        if model.optimizer is not None:
            keras_internals.set_optimizer(model, model.optimizer)
