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
    """The loss has become NaN or infinite."""


class Preempted(SystemExit):  # noqa: N818 - no error: the run ends as it was told to
    """Ends a process that was told to go by SIGTERM, after its state was saved; exit code 143, as a shell has it."""

    def __init__(self) -> None:
        super().__init__(143)
