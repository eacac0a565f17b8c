"""Where a model is cut into stages: each about equally much work, and small enough for its machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import keras
import tensorflow as tf

from tfdist.errors import ConfigError
from tfdist.training.pipeline.layer_graph import LayerGraph, variables_of

# A stage may be so much slower than in the most even cut, if less crosses then: no residual block shall be cut for the
# sake of a little balance.
_UNEVEN = 1.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage.

    Attributes:
        start: Number of its first layer call.
        stop: Of the call after its last.
        flops: Of a forward pass, for one example.
        weight_bytes: Of its weights.
        state_bytes: Of its weights, their gradients and slots, and of the outputs that wait for a backward pass.
        bytes_in: That cross from the stage before, for one example.
    """

    start: int
    stop: int
    flops: float
    weight_bytes: float
    state_bytes: float
    bytes_in: float


class Cutter:
    """Cuts a model.

    Args:
        graph: The model's.
        slots_per_weight: Numbers that the optimizer keeps for each weight.
        micro_batch_size: Examples that a stage computes at once.
        num_micro_batches: Of a batch.
        share: Of a weight, that one process of a stage has.
    """

    def __init__(
        self,
        graph: LayerGraph,
        *,
        slots_per_weight: int,
        micro_batch_size: int,
        num_micro_batches: int,
        share: Callable[[keras.Variable], float] = lambda variable: 1.0,
    ) -> None:
        self._graph = graph
        self._slots_per_weight = slots_per_weight
        self._micro_batch_size = micro_batch_size
        self._num_micro_batches = num_micro_batches
        self._share = share
        num_calls = len(graph.calls)
        self._crossing = [
            math.fsum(map(graph.num_bytes, graph.crossing(place))) for place in range(num_calls)
        ]
        self._places = [place for place in range(1, num_calls) if not graph.obstacle(place)]

    def cut(self, num_stages: int, *, most_bytes: float = math.inf) -> list[StagePlan]:
        """Returns stages of about equally much work, by counted operations, over whose cuts the fewest bytes cross.

        None of them needs more than `most_bytes`.

        Raises:
            ConfigError: If it cannot be cut so often, or not so small.
        """
        ends = [0, *self._places, len(self._graph.calls)]
        if num_stages > len(ends) - 1:
            raise ConfigError(self._too_many(num_stages, len(ends) - 1))
        stages = {
            (low, high): self._plan(ends[low], ends[high])
            for low in range(len(ends))
            for high in range(low + 1, len(ends))
        }
        # By the numbers of stages and of the end that they reach.
        fits = {
            (stage, *ends_of): plan
            for stage in range(num_stages)
            for ends_of, plan in stages.items()
            if self._held_bytes(plan, stage, num_stages) <= most_bytes
        }
        slowest = self._search(fits, num_stages, len(ends), lambda plan: (0.0, plan.flops))[0][1]
        even = {key: plan for key, plan in fits.items() if plan.flops <= _UNEVEN * slowest}
        # Of those over which equally few bytes cross, as between any two blocks of a transformer, the most even one.
        cuts = self._search(even, num_stages, len(ends), lambda plan: (plan.bytes_in, plan.flops))[1]
        if not cuts:
            raise ConfigError(
                f"no cut into {num_stages} stages gives each at most {most_bytes / 1e9:g} GB of weights, slots and "
                "activations: take more stages, or more micro-batches."
            )
        return [
            self._held(stages[low, high], stage, num_stages)
            for stage, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False))
        ]

    def cut_before(self, names: Sequence[str]) -> list[StagePlan]:
        """Returns the stages of a cut by hand: each but the first begins with the layer of that name.

        Raises:
            ConfigError: If there is no such layer, or no cut before it.
        """
        first: dict[str, int] = {}
        for place, call in enumerate(self._graph.calls):
            first.setdefault(call.operation.name, place)
        for name in names:
            if name not in first:
                raise ConfigError(f"cut={name!r}: the model has no such layer; it has {', '.join(first)}.")
            if reason := self._graph.obstacle(first[name]) if first[name] else "there is nothing before it":
                raise ConfigError(f"cut={name!r}: {reason}; begin the stage with another layer.")
        ends = [0, *(first[name] for name in names), len(self._graph.calls)]
        if ends != sorted(set(ends)):
            raise ConfigError(f"cut={','.join(names)!r}: name each layer once, in the model's order.")
        num_stages = len(ends) - 1
        return [
            self._held(self._plan(low, high), stage, num_stages)
            for stage, (low, high) in enumerate(zip(ends, ends[1:], strict=False))
        ]

    def _plan(self, start: int, stop: int) -> StagePlan:
        operations = [call.operation for call in self._graph.calls[start:stop]]
        weights = [v for v in variables_of(operations) if v.trainable]
        weight_bytes = math.fsum(self._share(v) * _num_bytes(v) for v in weights)
        return StagePlan(
            start=start,
            stop=stop,
            flops=math.fsum(self._graph.flops[start:stop]),
            weight_bytes=weight_bytes,
            state_bytes=weight_bytes * (2 + self._slots_per_weight),
            bytes_in=self._crossing[start],
        )

    def _held(self, plan: StagePlan, stage: int, num_stages: int) -> StagePlan:
        return dataclasses.replace(plan, state_bytes=self._held_bytes(plan, stage, num_stages))

    def _held_bytes(self, plan: StagePlan, stage: int, num_stages: int) -> float:
        num_live = min(num_stages - stage, self._num_micro_batches)
        outputs = math.fsum(self._graph.output_bytes[plan.start : plan.stop])
        return plan.state_bytes + num_live * self._micro_batch_size * outputs

    @staticmethod
    def _search(
        plans: Mapping[tuple[int, int, int], StagePlan],
        num_stages: int,
        num_ends: int,
        cost: Callable[[StagePlan], tuple[float, float]],
    ) -> tuple[tuple[float, float], tuple[int, ...]]:
        """Returns the least joint cost of a way to cut, and its ends; none of them if there is no way.

        Args:
            plans: Of each stage that may be: by its number, and by the ends where it starts and stops.
            num_stages: How many.
            num_ends: Of what.
            cost: Of a stage: what adds up over the stages, and of what, where that is equal, the largest counts.
        """
        best: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {0: ((0.0, 0.0), (0,))}
        for stage in range(num_stages):
            following: dict[int, tuple[tuple[float, float], tuple[int, ...]]] = {}
            for low, ((total, largest), cuts) in best.items():
                for high in range(low + 1, num_ends):
                    plan = plans.get((stage, low, high))
                    if plan is not None:
                        added, own = cost(plan)
                        found = ((total + added, max(largest, own)), (*cuts, high))
                        following[high] = min(following.get(high, found), found)
            best = following
        return best.get(num_ends - 1, ((math.inf, math.inf), ()))

    def _too_many(self, num_stages: int, most: int) -> str:
        graph = self._graph
        reasons = [reason for place in range(1, len(graph.calls)) if (reason := graph.obstacle(place))]
        why = f" ({reasons[0]})" if reasons else ""
        return f"num_stages={num_stages}, and the model can be cut into {most} at most{why}; ask for fewer."


def count_slots(optimizer: keras.optimizers.Optimizer | None) -> int:
    """Returns the numbers that an optimizer keeps for each weight."""
    if optimizer is None:
        return 0
    copy = type(optimizer).from_config(optimizer.get_config())
    before = len(copy.variables)
    copy.build([keras.Variable([0.0])])
    return len(copy.variables) - before


def _num_bytes(variable: keras.Variable) -> int:
    return math.prod(variable.shape) * tf.as_dtype(keras.backend.standardize_dtype(variable.dtype)).size
