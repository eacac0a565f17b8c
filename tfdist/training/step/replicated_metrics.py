"""The state of a model's metrics, of which each replica has the part that its examples have added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist import keras_internals
from tfdist.collectives import reduce_all
from tfdist.training.metric_parts import aggregation_of, part_origin, start_state, weigh_part
from tfdist.training.step.replicas import Replicas


class ReplicatedMetrics:
    """Brings the parts of a model's metrics together, and shares a state out.

    Args:
        model: Built.
        replicas: Which have the parts.
        whole: Metrics that see the examples of all replicas, and so are the same on each.

    Attributes:
        whole: The same.
        start: What the state starts from.
        origins: What the parts are counted from; see `part_origin`.
        partial_ids: The `id` of each variable that has only a part.
    """

    def __init__(
        self, model: keras.Model, replicas: Replicas, whole: Sequence[keras.metrics.Metric] = ()
    ) -> None:
        self.whole = list(whole)
        self.start = start_state(model)
        self._model = model
        self._replicas = replicas
        # Those that see all examples are the same on every replica, whoever has any.
        self._whole_ids = {id(v) for metric in whole for v in metric.variables}
        self.partial_ids = {id(v) for v in model.metrics_variables} - self._whole_ids
        aggregations = [self._aggregation(v) for v in model.metrics_variables]
        self.origins = [part_origin(s, a) for s, a in zip(self.start, aggregations, strict=True)]
        self._reset: Callable[[], Any] | None = None
        self._total: Callable[[], Any] | None = None

    def reset(self) -> None:
        """Lets the metrics begin anew: in one call, where Keras has one of 10 ms for each variable under workers."""
        if not keras_internals.resets_by_variables(self._model):
            self._model.reset_metrics()
            return
        if self._reset is None:

            def reset(index: int) -> None:
                for variable, start in zip(self._model.metrics_variables, self.start, strict=True):
                    self._replicas.local(variable, index).assign(start)

            self._reset = self._replicas.compile(reset)
        self._reset()

    def state(self) -> list[Any]:
        """Returns the state over the examples of all replicas; every process must call it."""
        if self._total is None:

            def total(index: int) -> list[Any]:
                context = tf.distribute.get_replica_context()
                changes = self._changes(index, is_first=context.replica_id_in_sync_group == 0)
                sums = reduce_all(context, tf.distribute.ReduceOp.SUM, changes)
                return [origin + change for origin, change in zip(self.origins, sums, strict=True)]

            self._total = self._replicas.compile(total)
        return [self._replicas.first_local(v).numpy() for v in self._total()]

    def own(self) -> list[np.ndarray]:
        """Returns what this process's replicas have added to the state."""
        parts = [
            self._changes(index, is_first=self._replicas.first + index == 0)
            for index in range(self._replicas.num_local)
        ]
        return [np.asarray(sum(changes)) for changes in zip(*parts, strict=True)]

    def set_state(self, state: Sequence[Any]) -> None:
        """Gives the replicas a state: the first one where the parts are added up, the others what they start from."""

        def share_out(index: int, values: Sequence[Any]) -> None:
            is_first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
            for variable, value, start in zip(self._model.metrics_variables, values, self.start, strict=True):
                is_own = is_first | (self._aggregation(variable) != "sum")
                self._replicas.local(variable, index).assign(tf.where(is_own, value, start))

        self._replicas.compile(share_out)([tf.convert_to_tensor(value) for value in state])

    def _changes(self, index: int, *, is_first: Any) -> list[Any]:
        return [
            weigh_part(
                self._replicas.local(variable, index) - origin,
                self._aggregation(variable),
                is_first=is_first,
                num_parts=self._replicas.num_all,
            )
            for variable, origin in zip(self._model.metrics_variables, self.origins, strict=True)
        ]

    def _aggregation(self, variable: keras.Variable) -> str:
        return "only_first_replica" if id(variable) in self._whole_ids else aggregation_of(variable)
