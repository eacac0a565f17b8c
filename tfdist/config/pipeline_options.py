"""How a model is divided into stages, and a batch into micro-batches."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from tfdist.config.settings import check_settings, setting
from tfdist.errors import ConfigError

PIPELINE_SCHEDULES = ("1f1b", "gpipe")
_MICRO_BATCHES = 8


class Layout(NamedTuple):
    """How the processes of a run share a model, and a batch.

    Attributes:
        num_copies: Of the model.
        num_stages: Of a copy.
        num_blocks: Of a stage, a process each.
        num_micro_batches: Of a copy's part of a batch.
    """

    num_copies: int
    num_stages: int
    num_blocks: int
    num_micro_batches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """What the stages of a `pipeline` are.

    Args:
        num_stages: Into so many the model's layers are divided, each in a process of its own; None: as many as there
            are workers (or as their blocks allow). Where there are several times as many, copies of the model share
            each batch.
        tensor_parallel: Into so many blocks each layer is divided that can be, each in a process of its own
            (Shoeybi et al. 2019): attention by heads, pairs of `Dense` by their inner units, a large vocabulary by its
            words. There are `num_stages × tensor_parallel` processes in a copy of the model.
        num_micro_batches: Into so many each copy's part of a batch is divided, which go through the stages one after
            the other. The more there are, the less a stage waits:
            `(num_stages - 1) / (num_micro_batches + num_stages - 1)` of the time. None: 8, or 1 for one stage.
        pipeline_schedule: "1f1b" (PipeDream-flush, Narayanan et al. 2021) lets a stage hold as many micro-batches as
            there are stages; "gpipe" (Huang et al. 2019) all of them.
        recompute: A stage keeps only what comes in of a micro-batch, and makes the rest again for its backward pass: a
            third more work, for less memory.
        cut: Names of the layers that the second stage, the third and so on begin with, with commas between them; None:
            where the stages are about equally much work, by counted operations.
        stage_memory_gb: The most that a stage may need for weights, gradients, slots and activations (10**9 bytes).

    Raises:
        ConfigError: If a value breaks its rule, or does not go with another.

    Examples:
        >>> import tfdist
        >>> tfdist.PipelineOptions(num_stages=2, tensor_parallel=2).layout(8)
        Layout(num_copies=2, num_stages=2, num_blocks=2, num_micro_batches=8)
    """

    num_stages: int | None = setting(
        None, least=1, help="Stages of pipeline, each in a process of its own. Default: one for each worker."
    )
    tensor_parallel: int = setting(
        1, least=1, help="Blocks of a layer under pipeline, each in a process of its own."
    )
    num_micro_batches: int | None = setting(
        None,
        least=1,
        help="Parts of a batch that go through the stages one after the other. Default: 8, or 1 for one stage.",
    )
    pipeline_schedule: str = setting(
        "1f1b", choices=PIPELINE_SCHEDULES, help="Order of a stage's forward and backward passes."
    )
    recompute: bool = setting(
        False, help="Stages of pipeline keep what comes in, and compute the rest again in the backward pass."
    )
    cut: str | None = setting(
        None, help="Layers that the stages after the first begin with. Default: equal shares of the work."
    )
    stage_memory_gb: float | None = setting(
        None, above=0, help="Memory that a stage may need (10**9 bytes). Default: any."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.cut is None or self.num_stages is None:
            return
        if len(self.cut_layers) != self.num_stages - 1:
            raise ConfigError(
                f"cut={self.cut!r} with num_stages={self.num_stages}: name {self.num_stages - 1} layers, or leave one "
                "of the two out."
            )

    def layout(self, num_workers: int) -> Layout:
        """Returns how so many workers share a model.

        Raises:
            ConfigError: If they make no whole number of copies.
        """
        num_stages = self.num_stages or max(num_workers // self.tensor_parallel, 1)
        num_copies, rest = divmod(num_workers, num_stages * self.tensor_parallel)
        if rest or not num_copies:
            raise ConfigError(
                f"num_stages={num_stages}, tensor_parallel={self.tensor_parallel} with num_workers={num_workers}: each "
                "block of a stage is a worker, and copies of the model are whole; give a multiple of "
                f"{num_stages * self.tensor_parallel}, or leave num_workers out."
            )
        num_micro_batches = self.num_micro_batches or (_MICRO_BATCHES if num_stages > 1 else 1)
        return Layout(num_copies, num_stages, self.tensor_parallel, num_micro_batches)

    @property
    def cut_layers(self) -> list[str]:
        """The layers' names."""
        return [name.strip() for name in (self.cut or "").split(",") if name.strip()]
