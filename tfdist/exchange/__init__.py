"""How tensors cross between workers: what carries them, and in what form gradients are sent."""

from tfdist.exchange.by_type import gather_all, reduce_all
from tfdist.exchange.carrier import Carrier, CollectiveCarrier, MpiCarrier, choose_carrier, join, split
from tfdist.exchange.gradients import GradientExchange

__all__ = [
    "Carrier",
    "CollectiveCarrier",
    "GradientExchange",
    "MpiCarrier",
    "choose_carrier",
    "gather_all",
    "join",
    "reduce_all",
    "split",
]
