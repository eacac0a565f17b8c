"""The exceptions a user of tfdist may meet; each message says the value got, the rule and the remedy."""


class TfdistError(Exception):
    """Base of every error that tfdist raises on purpose.

    Examples:
        >>> import tfdist
        >>> issubclass(tfdist.ConfigError, tfdist.TfdistError)
        True
    """


class ConfigError(TfdistError, ValueError):
    """A setting, a flag or an argument cannot be honoured.

    Examples:
        >>> import tfdist
        >>> tfdist.Checkpoints(directory="checkpoints", keep=0)
        Traceback (most recent call last):
        tfdist.errors.ConfigError: checkpoints: keep=0: it must be more than 0.
    """


class ClusterError(ConfigError):
    """A cluster description (TF_CONFIG or a scheduler's variables) contradicts itself or the strategy.

    Examples:
        >>> import tfdist
        >>> tfdist.Cluster(addresses={"worker": ("h1", "h2")})
        Traceback (most recent call last):
        tfdist.errors.ClusterError: address 'h1' has no port: write host:port, as in h1:2222
    """


class LaunchError(TfdistError, RuntimeError):
    """Processes could not be started or supervised.

    Examples:
        >>> import tfdist
        >>> try:
        ...     raise tfdist.LaunchError("host h2 does not answer")
        ... except RuntimeError as error:
        ...     print(error)
        host h2 does not answer
    """


class NonFiniteError(TfdistError, ArithmeticError):
    """The loss or the gradients of a step are NaN or infinite.

    Examples:
        >>> import keras, numpy, tfdist
        >>> run = tfdist.initialize(strategy="one_device")
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> x = numpy.full((4, 1), numpy.nan)
        >>> try:
        ...     history = run.fit(model, x, x, batch_size=2, verbose=0, on_nan="stop")
        ... except tfdist.NonFiniteError as error:
        ...     print(str(error).partition(":")[0])
        the loss is not finite in epoch 1 at step 1
    """


PEER_LOST_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class Regroup(Exception):  # noqa: N818 - no error: the work goes on in another cluster
    """The cluster is to be formed anew; carries the state from which it goes on. Never leaves tfdist."""

    def __init__(self, snapshot: object) -> None:
        super().__init__("the cluster is formed anew")
        self.snapshot = snapshot


class PeerLost(SystemExit):  # noqa: N818 - another task failed, not this one
    """Ends a process whose peers are gone in the middle of a step; exit code 75, at which the launcher tries again."""

    def __init__(self) -> None:
        super().__init__(PEER_LOST_CODE)


class OutOfMemoryError(TfdistError, MemoryError):
    """A task has no memory left for a tensor."""


class Preempted(SystemExit):  # noqa: N818 - no error: the run ends as it was told to
    """Ends a process that was told to go by SIGTERM, after its state was saved; exit code 143, as a shell has it.

    Examples:
        >>> import tfdist
        >>> tfdist.Preempted().code
        143
    """

    def __init__(self) -> None:
        super().__init__(143)
