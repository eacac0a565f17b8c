"""The exceptions a user of tfdist may meet; each message says the value got, the rule and the remedy."""


class TfdistError(Exception):
    """Base of every error that tfdist raises on purpose."""


class ConfigError(TfdistError, ValueError):
    """A setting, a flag or an argument cannot be honoured."""


class ClusterError(ConfigError):
    """A cluster description (TF_CONFIG or a scheduler's variables) contradicts itself or the strategy."""


class LaunchError(TfdistError, RuntimeError):
    """Processes could not be started or supervised."""


class NonFiniteError(TfdistError, ArithmeticError):
    """The loss or the gradients of a step are NaN or infinite."""


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
    """Ends a process that was told to go by SIGTERM, after its state was saved; exit code 143, as a shell has it."""

    def __init__(self) -> None:
        super().__init__(143)
