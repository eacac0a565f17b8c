"""How much, how often and by what the workers of `multiworker` exchange: one frozen value, checked where it is made."""

import dataclasses

from tfdist.config.settings import check_settings, setting
from tfdist.errors import ConfigError

SYNCS = ("every_step", "local_sgd", "diloco", "gossip", "delayed")
EXCHANGES = ("auto", "collective", "mpi")
EXCHANGE_DTYPES = ("float32", "bfloat16", "float16")
COMPRESSIONS = ("powersgd",)
GRAPHS = ("ring", "exponential", "complete")
DEFAULT_PERIODS = {"local_sgd": 32, "diloco": 100, "gossip": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyncOptions:
    """What crosses between workers.

    Only `every_step` gives the answer of one device. The others let workers differ for a while; at every checkpoint, at
    each epoch's end, and so before every evaluation, they agree: weights become what `sync` says, and at a checkpoint
    the optimizers' slots become the mean over the workers, in a run that goes on as in one that is resumed.

    Args:
        sync: `every_step` adds the gradients up at each step. `local_sgd` lets each worker step by itself, and averages
            the weights every `sync_period` steps, each worker weighted by the examples that it has seen (Lin et al.
            2018). `diloco` takes the difference that such an average makes for a gradient, and applies it by Nesterov's
            momentum (Douillard et al. 2023). `gossip` lets each worker step by itself and then average with its
            neighbours alone, every `sync_period` steps (Lian et al. 2017). `delayed` applies at each step the gradients
            of the step before, which are added up while the new ones are computed.
        sync_period: Steps between two exchanges of `local_sgd`, `diloco` and `gossip`; None: 32, 100 and 1.
        sync_warmup_steps: Steps of the run before which it is `every_step` all the same (post-local SGD).
        sync_graph: Of `gossip`, with whom: `ring`, both neighbours, all with equal weight; `exponential`, those at a
            distance that doubles from exchange to exchange; `complete`, all.
        outer_learning_rate: Of `diloco`.
        outer_momentum: Of `diloco`.
        exchange: What carries it: `collective`, TensorFlow's own; `mpi`; or `auto`, the faster for the model's size.
        exchange_dtype: In which gradients, or differences, cross. By `mpi` they are added up in float32 all the same.
        error_feedback: Whether what narrowing to `exchange_dtype` leaves out is added to the next step's gradients.
        bucket_mb: Gradients cross in buckets of about so many megabytes (2**20 bytes), from the last layers on.
        compression: `powersgd` sends two thin factors of each matrix of gradients; what they leave out is added to the
            next step's (Vogels et al. 2019). None sends all.
        compression_rank: Columns of a factor.

    Raises:
        ConfigError: If a value breaks its rule, or belongs to another `sync`.

    Examples:
        >>> import tfdist
        >>> tfdist.SyncOptions(sync="local_sgd").num_period_steps
        32
        >>> tfdist.SyncOptions(sync="local_sdg")
        Traceback (most recent call last):
        tfdist.errors.ConfigError: sync='local_sdg': choose one of every_step, local_sgd, ...
    """

    sync: str = setting(
        "every_step", choices=SYNCS, help="How workers of multiworker combine what they learn."
    )
    sync_period: int | None = setting(
        None,
        least=1,
        help="Steps between two exchanges of local_sgd, diloco and gossip. Default: 32, 100, 1.",
    )
    sync_warmup_steps: int = setting(0, least=0, help="The first so many steps exchange as every_step does.")
    sync_graph: str = setting("ring", choices=GRAPHS, help="With whom a worker of --sync=gossip averages.")
    outer_learning_rate: float = setting(0.7, above=0, help="Learning rate of the outer step of diloco.")
    outer_momentum: float = setting(0.9, least=0, help="Nesterov momentum of the outer step of diloco.")
    exchange: str = setting(
        "auto", choices=EXCHANGES, help="What carries gradients between workers; auto: the faster."
    )
    exchange_dtype: str = setting(
        "float32", choices=EXCHANGE_DTYPES, help="The type in which gradients cross between workers."
    )
    error_feedback: bool = setting(
        False, help="Add what exchange_dtype rounds away to the next step's gradients."
    )
    bucket_mb: float = setting(
        25.0, above=0, help="Gradients cross in buckets of about so many MB (2**20 bytes)."
    )
    compression: str | None = setting(
        None, choices=COMPRESSIONS, help="Send two thin factors of each matrix of gradients."
    )
    compression_rank: int = setting(4, least=1, help="Columns of a factor of powersgd.")

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.outer_momentum < 1:
            raise ConfigError(f"outer_momentum={self.outer_momentum}: it must be 0 or more, and less than 1.")
        if self.sync_period is not None and not self.is_local:
            raise ConfigError(
                f"sync_period={self.sync_period} with sync={self.sync!r}: it exchanges at every step; leave it out, or "
                f"choose one of {', '.join(DEFAULT_PERIODS)}."
            )
        if self.sync_warmup_steps and not self.is_local:
            raise ConfigError(
                f"sync_warmup_steps={self.sync_warmup_steps} with sync={self.sync!r}: it is for "
                f"{', '.join(DEFAULT_PERIODS)}; leave it out."
            )
        if self.compression is not None and self.sync != "every_step":
            raise ConfigError(
                f"compression={self.compression!r} with sync={self.sync!r}: only 'every_step' has it; leave it out."
            )
        if self.compression is not None and self.exchange_dtype != "float32":
            raise ConfigError(
                f"compression={self.compression!r} with exchange_dtype={self.exchange_dtype!r}: choose one of the two."
            )
        if self.error_feedback and (self.exchange_dtype == "float32" or self.sync != "every_step"):
            raise ConfigError(
                f"error_feedback with exchange_dtype={self.exchange_dtype!r} and sync={self.sync!r}: it is for a "
                "narrower type at every step; leave it out, or choose exchange_dtype=bfloat16."
            )

    @property
    def is_local(self) -> bool:
        """Whether workers step each for itself, between two exchanges of weights."""
        return self.sync in DEFAULT_PERIODS

    @property
    def num_period_steps(self) -> int:
        """Steps between two exchanges."""
        return self.sync_period or DEFAULT_PERIODS.get(self.sync, 1)
