"""The ways to train that a plan compares, and the flags that ask for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tfdist.cluster.spec import CLUSTER_STRATEGIES, find_nearest
from tfdist.config.pipeline_options import PipelineOptions
from tfdist.config.privacy_options import PrivacyOptions
from tfdist.config.ps_options import PS_SHARED, PsOptions
from tfdist.config.settings import settings_of
from tfdist.config.sync_options import DEFAULT_PERIODS, SyncOptions
from tfdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to train, whatever the number of workers.

    Attributes:
        strategy: Canonical name.
        settings: Of `RunConfig`, besides the strategy.
        is_exact: Whether it gives the answer of one device.
        num_exchanges: One after the other, whenever workers share.
        sized: Name of a setting that is the number of workers.
    """

    strategy: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_exact: bool = False
    num_exchanges: int = 1
    sized: str = ""

    @property
    def has_workers(self) -> bool:
        """Whether several processes make up its cluster."""
        return self.strategy in CLUSTER_STRATEGIES

    @property
    def period(self) -> int:
        """Steps between two exchanges."""
        return DEFAULT_PERIODS.get(self.settings.get("sync", ""), 1)

    def settings_for(self, num_workers: int) -> dict[str, Any]:
        """Returns its settings with so many workers."""
        return {**self.settings, **({self.sized: num_workers} if self.sized else {})}


KINDS: Mapping[str, Kind] = {
    "one_device": Kind(strategy="one_device", is_exact=True),
    "mirrored": Kind(strategy="mirrored", is_exact=True),
    "every_step": Kind(strategy="multiworker", is_exact=True),
    "bfloat16": Kind(strategy="multiworker", settings={"exchange_dtype": "bfloat16"}),
    "powersgd": Kind(strategy="multiworker", settings={"compression": "powersgd"}, num_exchanges=2),
    "local_sgd": Kind(strategy="multiworker", settings={"sync": "local_sgd"}),
    "diloco": Kind(strategy="multiworker", settings={"sync": "diloco"}),
    "gossip": Kind(strategy="multiworker", settings={"sync": "gossip"}),
    "delayed": Kind(strategy="multiworker", settings={"sync": "delayed"}),
    "ps": Kind(strategy="ps"),
    "ps_sync": Kind(strategy="ps", settings={"ps_mode": "sync"}, is_exact=True),
    "stages": Kind(strategy="pipeline", is_exact=True),
    "blocks": Kind(strategy="pipeline", settings={"num_stages": 1}, sized="tensor_parallel", is_exact=True),
}
# A trial in which no worker shares anything.
OWN = "own"
# A line that begins so is what a trial has found, as JSON.
MARK = "tfdist-probe "
# Of which each process holds a part of the model.
DIVIDING = ("stages", "blocks")
DEFAULT_WAYS = ("one_device", "every_step", "bfloat16", "powersgd", "local_sgd", "diloco", "ps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train in one size.

    Attributes:
        name: Of its kind, one of `KINDS`.
        num_workers: That compute.
        batch_size: Examples of an optimizer step over all of them; under asynchronous `ps`, of each worker's step.
    """

    name: str
    num_workers: int
    batch_size: int

    @property
    def kind(self) -> Kind:
        """What it is."""
        return KINDS[self.name]

    def flags(self) -> list[str]:
        """Returns the flags of `tfdist.train` that ask for it."""
        kind = self.kind
        words = [f"--strategy={kind.strategy}"]
        if kind.has_workers:
            words.append(f"--num_workers={self.num_workers}")
        words += [f"--{name}={value}" for name, value in kind.settings_for(self.num_workers).items()]
        return [*words, f"--global_batch_size={self.batch_size}"]


# What a plan chooses, or does not know.
_OWN_OF_PLANS = (
    *("strategy", "num_workers", "sync", "sync_period", "compression", "exchange_dtype", "ps_mode"),
    *("num_stages", "tensor_parallel"),
)
_NOT_PLANNED = ("mode", "resume", "run_dir", "evaluator", *settings_of(PrivacyOptions))


def check_flags(flags: Sequence[str]) -> None:
    """Checks flags of `tfdist.train`.

    Args:
        flags: Words such as `--recipe=digits_cnn`.

    Raises:
        ConfigError: If one is a plan's to choose, or none can know what it will cost.
    """
    for flag in flags:
        name = _name_of(flag)
        if name in _OWN_OF_PLANS:
            raise ConfigError(f"{name}: a plan tries all ways; leave it out, or choose them by --ways.")
        if name in _NOT_PLANNED:
            raise ConfigError(f"{name}: a plan is of plain training; leave it out.")


def flags_of(strategy: str, flags: Sequence[str]) -> list[str]:
    """Returns those flags of `tfdist.train` that a strategy has."""
    ps_alone = set(settings_of(PsOptions)) - {*PS_SHARED} | {"num_ps"}
    alone = {
        "multiworker": set(settings_of(SyncOptions)),
        "ps": ps_alone,
        "mirrored": {"num_replicas"},
        "pipeline": set(settings_of(PipelineOptions)),
    }
    others = set().union(*(names for name, names in alone.items() if name != strategy))
    return [flag for flag in flags if _name_of(flag) not in others]


def _name_of(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0]


def parse_ways(text: str | None, *, is_linked: bool = False) -> Sequence[str] | None:
    """Reads a list of kinds.

    Args:
        text: Names with commas between them; None: the usual ones.
        is_linked: Whether what is between machines is told, and not tried.

    Raises:
        ConfigError: If there is none of a name.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in KINDS:
            nearest = find_nearest(name, KINDS)
            hint = f"did you mean {nearest!r}?" if nearest else f"choose from {', '.join(KINDS)}."
            raise ConfigError(f"ways={name!r}: {hint}")
        if is_linked and name in DIVIDING:
            raise ConfigError(
                f"ways={name!r} with link: it is tried on machines that are there; give --hosts."
            )
    return list(dict.fromkeys(["one_device", *names]))
