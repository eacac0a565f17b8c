"""What each way to train will cost, from what trials have measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from tfdist.errors import TfdistError
from tfdist.planning.link import Link
from tfdist.planning.measure import Trial, World
from tfdist.planning.ways import DEFAULT_WAYS, DIVIDING, KINDS, OWN, Way

# More than this share of a step, and it is what limits.
_MOST_EXCHANGE, _MOST_INPUT = 0.5, 0.3
_PS_ROUNDS = 3
# A process that takes more than this share of a machine's memory asks for others to be divided among.
_MUCH_MEMORY = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needed:
    """A cluster that is needed for trials.

    Attributes:
        name: Its strategy's, or, where ways of one strategy need clusters of their own, the way's.
        strategy: Canonical name.
        num_workers: That compute.
        trials: Which.
        settings: Of `tfdist.train`.
    """

    name: str
    strategy: str
    num_workers: int
    trials: Sequence[Trial]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What training in a way is expected to be.

    Attributes:
        way: The way.
        step_secs: From one optimizer step to the next; under `ps` steps of several workers overlap.
        own_secs: Of these, a step without an exchange: forward and back, update, input.
        examples_per_sec: Of all workers.
        sent_mb_per_sec: By each worker, 10**6 bytes; None under `ps`, where it is not counted.
        memory_mb: Of a process, the most that its trials have had.
        hours: To the recipe's epochs, without evaluations and checkpoints; None of data of unknown length.
        limit: What a step waits for most.
    """

    way: Way
    step_secs: float
    own_secs: float
    examples_per_sec: float
    sent_mb_per_sec: float | None
    memory_mb: float
    hours: float | None
    limit: str

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as one flat object, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "way"}
        kind = self.way.kind
        return {
            "way": self.way.name,
            "strategy": kind.strategy,
            "num_workers": self.way.num_workers,
            "global_batch_size": self.way.batch_size,
            "is_exact": kind.is_exact,
            **values,
            "flags": self.way.flags(),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What workers together cost, besides each one's own steps.

    Attributes:
        exchange_secs: Of one exchange in lock step, by the number of workers.
        meeting_secs: Of one number, by the most workers that were tried.
        server_secs: That one step keeps a parameter server busy.
    """

    exchange_secs: Mapping[int, float] = dataclasses.field(default_factory=dict)
    meeting_secs: float = 0.0
    server_secs: float = 0.0

    def all_reduce_secs(self, num_workers: int) -> float:
        """Returns how long an exchange takes in a ring of so many workers.

        Of the largest that was tried, what a meeting takes grows with n − 1, and the rest with 1 − 1/n.
        """
        if num_workers in self.exchange_secs or num_workers == 1:
            return self.exchange_secs.get(num_workers, 0.0)
        size = max(self.exchange_secs)
        whole = self.exchange_secs[size]
        meeting = min(self.meeting_secs, whole)
        rounds, moved = (num_workers - 1) / (size - 1), (1 - 1 / num_workers) / (1 - 1 / size)
        return meeting * rounds + (whole - meeting) * moved


class Plan:
    """Predictions of one recipe.

    Args:
        ways: Names of `KINDS`; None: the usual ones, and those that divide the model if it is large.
        sizes: Numbers of workers.
        link: Between machines that are not there; None: the trials were made where training will be.
    """

    def __init__(self, ways: Sequence[str] | None, sizes: Sequence[int], link: Link | None) -> None:
        self._asked = ways
        self.link = link
        self.sizes = [size for size in sizes if size > 1]
        self.worlds: dict[tuple[str, int], World] = {}

    @property
    def ways(self) -> Sequence[str]:
        """Names of `KINDS`."""
        if self._asked is not None:
            return self._asked
        return (*DEFAULT_WAYS, *DIVIDING) if self.link is None and self._is_large else DEFAULT_WAYS

    @property
    def _is_large(self) -> bool:
        """Whether one process's training takes much of its machine's memory."""
        alone = self.worlds.get(("one_device", 1))
        if alone is None or not alone.timings:
            return False
        most = max(timing["memory_mb"] for timing in alone.timings.values())
        return most > _MUCH_MEMORY * alone.model["machine_mb"]

    def clusters(self) -> Iterator[Needed]:
        """Yields each cluster that is needed; which come last, the first ones' trials say."""
        for strategy, size, trials in self._usual_clusters():
            yield Needed(name=strategy, strategy=strategy, num_workers=size, trials=trials)
        for name in self._names_of("pipeline"):
            for size in self.sizes:
                settings = KINDS[name].settings_for(size)
                trials = [(name, Fraction(1))]
                yield Needed(
                    name=name, strategy="pipeline", num_workers=size, trials=trials, settings=settings
                )

    def _usual_clusters(self) -> Iterator[tuple[str, int, list[Trial]]]:
        whole = Fraction(1)
        # Behind a link that is not there, each machine has its share of the batch for itself.
        shares = [Fraction(1, size) for size in self.sizes] if self.link is not None else []
        yield "one_device", 1, [(OWN, factor) for factor in [whole, *shares]]
        if names := self._names_of("mirrored"):
            yield "mirrored", 1, [(name, whole) for name in names]
        if names := self._names_of("multiworker"):
            # And what a way costs besides the link shows in the smallest cluster.
            for size in self.sizes if self.link is None else self.sizes and [2]:
                # Much is measured against the first: it is made again at the end.
                own = [(OWN, whole), (OWN, Fraction(size))]
                yield "multiworker", size, [*own, *((name, whole) for name in names), (OWN, whole)]
        if names := self._names_of("ps"):
            for size in [1, *self.sizes] if self.link is None else [1]:
                yield "ps", size, [(name, whole) for name in names]

    def _names_of(self, strategy: str) -> list[str]:
        return [name for name in self.ways if KINDS[name].strategy == strategy]

    def predict(self) -> list[Prediction]:
        """Returns what is expected of each way in each size, the fastest first."""
        found = [self._predict(way) for way in self._all_ways()]
        return sorted((p for p in found if p is not None), key=lambda p: -p.examples_per_sec)

    @property
    def alone(self) -> World:
        """The trials on one device; where these were not to be made, of the smallest cluster.

        Raises:
            TfdistError: If none could be made anywhere.
        """
        found = [world for world in self.worlds.values() if world.model]
        if not found:
            raise TfdistError("; ".join(f"{name}: {why}" for name, why in self.refusals().items()))
        return found[0]

    @property
    def batch_size(self) -> int:
        """The recipe's."""
        return int(self.alone.model["batch_size"])

    def refusals(self) -> Mapping[str, str]:
        """Returns why a way cannot be, by its name."""
        return {name: why for world in self.worlds.values() for name, why in world.refused.items()}

    def cost_of(self, name: str, sizes: Sequence[int]) -> Cost | None:
        """Returns what a way costs besides each worker's own steps; None if it was not tried.

        Args:
            name: One of `KINDS`.
            sizes: Numbers of workers; behind a link that is not there, it is known for all of them.
        """
        if KINDS[name].strategy == "ps":
            found = self._predict_ps(Way(name=name, num_workers=1, batch_size=self.batch_size))
            if found is None:
                return None
            # What a step takes here besides what it takes alone: most of it the server's and its chief's.
            busy = max(found.step_secs - found.own_secs, 0.0)
            if self.link is not None:
                busy = max(busy, self.link.send_secs(1e6 * self.alone.model["gradient_mb"]))
            return Cost(server_secs=busy)
        exchange_secs = {}
        for size in self.sizes if self.link is None else sizes:
            if size > 1 and (secs := self._exchange_secs(name, size)) is not None:
                exchange_secs[size] = secs
        if not exchange_secs:
            return None
        world = self.worlds["multiworker", max(self.sizes) if self.link is None else 2]
        return Cost(exchange_secs=exchange_secs, meeting_secs=world.model["meeting_secs"])

    def _exchange_secs(self, name: str, num_workers: int) -> float | None:
        """Returns how long an exchange takes, above what a step takes without one; None if it was not tried."""
        world = self.worlds.get(("multiworker", num_workers if self.link is None else 2))
        tried = world and world.secs(name, self.batch_size)
        own = world and world.secs(OWN, self.batch_size)
        if not world or not tried or not own:
            return None
        secs = max(tried - own, 0.0)
        if self.link is not None:
            num_exchanges = KINDS[name].num_exchanges
            each = 1e6 * world.timings[name, self.batch_size]["sent_mb"] / num_exchanges
            secs += num_exchanges * self.link.all_reduce_secs(each, num_workers)
        return secs

    def _all_ways(self) -> Iterator[Way]:
        for name in self.ways:
            strategy = KINDS[name].strategy
            sizes = {"one_device": [1], "mirrored": [1], "ps": [1, *self.sizes]}.get(strategy, self.sizes)
            for size in sizes:
                yield Way(name=name, num_workers=size, batch_size=self.batch_size)
                if strategy == "multiworker":
                    yield Way(name=name, num_workers=size, batch_size=self.batch_size * size)

    def _predict(self, way: Way) -> Prediction | None:
        strategy = way.kind.strategy
        if strategy in ("one_device", "mirrored"):
            world = self.worlds.get((strategy, 1))
            secs = world and world.secs(OWN if strategy == "one_device" else way.name, way.batch_size)
            return self._describe(way, world, secs, secs) if world and secs else None
        if strategy == "ps":
            return self._predict_ps(way)
        if strategy == "pipeline":
            world = self.worlds.get((way.name, way.num_workers))
            secs = world and world.secs(way.name, way.batch_size)
            own = self.alone.secs(OWN, way.batch_size)
            least = secs if own is None else min(own / way.num_workers, secs or own)
            return self._describe(way, world, secs, least or 0.0) if world and secs else None
        return self._predict_together(way)

    def _predict_ps(self, way: Way) -> Prediction | None:
        world = self.worlds.get(("ps", way.num_workers if self.link is None else 1))
        secs = world and world.secs(way.name, self.batch_size)
        own = self.alone.secs(OWN, self.batch_size)
        if not world or not secs or not own:
            return None
        if self.link is not None:
            # The first worker shares the server's machine. Each of the others asks for the weights, hands in what it
            # has found, and is told of its next step; the server's cable carries all of theirs.
            crossing = self.link.send_secs(1e6 * self.alone.model["gradient_mb"])
            far = secs + _PS_ROUNDS * self.link.round_trip_secs + 2 * crossing
            rate = 1 / secs + min((way.num_workers - 1) / far, 1 / max(crossing, 1e-9))
            secs = 1 / rate
        return self._describe(way, world, secs, min(own / way.num_workers, secs))

    def _predict_together(self, way: Way) -> Prediction | None:
        exchange = self._exchange_secs(way.name, way.num_workers)
        if exchange is None:
            return None
        world = self.worlds["multiworker", way.num_workers if self.link is None else 2]
        if self.link is None:
            own = world.secs(OWN, way.batch_size)
        else:
            own = self.alone.secs(OWN, way.batch_size // way.num_workers)
        if own is None:
            return None
        # What `delayed` hides is hidden in a trial already.
        hides = way.name == "delayed" and self.link is not None
        secs = max(own, exchange) if hides else own + exchange / way.kind.period
        sent_mb = world.timings[way.name, self.batch_size]["sent_mb"] / way.kind.period
        return self._describe(way, world, secs, own, sent_mb=sent_mb)

    def _describe(
        self, way: Way, world: World, secs: float, own: float, *, sent_mb: float | None = None
    ) -> Prediction:
        model = self.alone.model
        names = (way.name, OWN) if way.name in KINDS else (OWN,)
        timings = [t for (name, _), t in world.timings.items() if name in names]
        num_examples, steps = model["num_examples"], model["steps_per_epoch"]
        if num_examples and (steps is None or steps * self.batch_size >= num_examples):
            steps = math.ceil(num_examples / way.batch_size)
        elif steps is not None:
            steps = math.ceil(steps * self.batch_size / way.batch_size)
        waits = max((t["input_share"] or 0.0 for t in timings), default=0.0)
        limit = "compute"
        if secs - own > _MOST_EXCHANGE * secs:
            limit = "exchange"
        elif waits > _MOST_INPUT:
            limit = "input"
        return Prediction(
            way=way,
            step_secs=secs,
            own_secs=own,
            examples_per_sec=way.batch_size / secs,
            sent_mb_per_sec=None if sent_mb is None else sent_mb / secs,
            memory_mb=max((t["memory_mb"] for t in timings), default=0.0),
            hours=None if steps is None else steps * model["epochs"] * secs / 3600,
            limit=limit,
        )
