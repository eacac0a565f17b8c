"""How tensors cross between workers: what carries them, and in what form gradients are sent."""

from tfdist.collectives.by_type import gather_all, reduce_all
from tfdist.collectives.communicator import (
    CollectiveCommunicator,
    Communicator,
    MpiCommunicator,
    choose_communicator,
    join,
    split,
)
from tfdist.collectives.gradients import GradientExchange

__all__ = [
    "Communicator",
    "CollectiveCommunicator",
    "GradientExchange",
    "MpiCommunicator",
    "choose_communicator",
    "gather_all",
    "join",
    "reduce_all",
    "split",
]
