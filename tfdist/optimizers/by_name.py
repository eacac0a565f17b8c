"""Keras's optimizers by name, as the flags of `tfdist.train` choose them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tfdist.errors import ConfigError
from tfdist.optimizers.schedules import build_schedule, parse_choice

if TYPE_CHECKING:
    import keras

# Name → the class in keras.optimizers or tfdist.optimizers, what differs from that class's defaults, and the learning
# rate if none is given.
_OPTIMIZERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "sgd": ("SGD", {}, 0.1),
    "momentum": ("SGD", {"momentum": 0.9}, 0.05),
    "adagrad": ("Adagrad", {}, 0.05),
    "rmsprop": ("RMSprop", {}, 1e-3),
    "adam": ("Adam", {}, 1e-3),
    "adamw": ("AdamW", {}, 1e-3),
    "ftrl": ("Ftrl", {}, 0.05),
    "lamb": ("Lamb", {}, 1e-3),
    "lars": ("LARS", {"momentum": 0.9}, 1.0),
    "lazy_momentum": ("LazySGD", {"momentum": 0.9}, 0.05),
    "lazy_rmsprop": ("LazyRMSprop", {}, 1e-3),
    "lazy_adam": ("LazyAdam", {}, 1e-3),
    "lazy_ftrl": ("LazyFtrl", {}, 0.05),
}
OPTIMIZERS = tuple(_OPTIMIZERS)
_WITHOUT_DECAY = ("ftrl", "lazy_ftrl")
_WITH_MOMENTUM = ("sgd", "momentum", "rmsprop", "lars", "lazy_momentum", "lazy_rmsprop")


# Long: its arguments, one a line.
def build_optimizer(
    name: str,
    *,
    learning_rate: float | None = None,
    rate_factor: float = 1.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    clipnorm: float | None = None,
    global_clipnorm: float | None = None,
    gradient_accumulation_steps: int | None = None,
    use_ema: bool = False,
    ema_momentum: float = 0.99,
) -> keras.optimizers.Optimizer:
    """Builds an optimizer: a stock one of Keras, so that a model saved with it loads in plain Keras, or one of ours.

    The lazy ones are for tables of which a step touches few rows; `tfdist.optimizers.lazy` says what changes. `lars`
    is for very large batches.

    Args:
        name: One of `OPTIMIZERS`, in any case: sgd, momentum (SGD with 0.9), adagrad, rmsprop, adam, adamw, ftrl, lamb,
            lars, lazy_momentum, lazy_rmsprop, lazy_adam, lazy_ftrl.
        learning_rate: The rate at its highest; None takes the optimizer's own: sgd 0.1, momentum, adagrad, ftrl and
            their lazy forms 0.05, lars 1, the others 0.001.
        rate_factor: What the rate, given or the optimizer's own, is multiplied by; see `rate_factor`.
        schedule: One of `SCHEDULES`: constant, cosine, step; see `build_schedule`.
        warmup_steps: Batches over which the rate first rises linearly.
        total_steps: Batches in the whole run; cosine and step need it.
        momentum: For sgd, momentum, rmsprop and lars, and the lazy forms of momentum and rmsprop; None takes 0.9 for
            momentum and lars and 0 for the others.
        weight_decay: Share of each weight taken off per step, times the learning rate (decoupled, whatever the
            optimizer but lars, for which it is part of the gradient); None takes 0.004 for adamw and none for the
            others.
        clipnorm: Longest gradient of one variable, in L2 norm.
        global_clipnorm: Longest gradient of all variables together, in L2 norm; excludes `clipnorm`.
        gradient_accumulation_steps: Batches whose mean gradient makes one update.
        use_ema: Keep a moving average of the weights, which replaces them when `fit` ends.
        ema_momentum: Share of the old average kept at each batch.

    Returns:
        The optimizer, not yet built.

    Raises:
        ConfigError: If a name is unknown, a number out of range, or a setting does not fit the optimizer.

    Examples:
        >>> import tfdist
        >>> optimizer = tfdist.optimizers.build_optimizer(
        ...     "adamw", learning_rate=0.001, schedule="cosine", warmup_steps=10, total_steps=100
        ... )
        >>> type(optimizer).__name__
        'AdamW'
    """
    name = parse_choice(name, OPTIMIZERS, what="optimizer")
    class_name, kwargs, default_rate = _OPTIMIZERS[name]
    kwargs = dict(kwargs)
    if momentum is not None:
        if name not in _WITH_MOMENTUM:
            raise ConfigError(
                f"momentum={momentum!r}: {name} has no momentum; leave it out, or choose {', '.join(_WITH_MOMENTUM)}."
            )
        kwargs["momentum"] = momentum
    if weight_decay and name in _WITHOUT_DECAY:
        raise ConfigError(
            f"weight_decay={weight_decay!r}: {name} computes each weight anew from its sums, so that it would come to "
            "nothing; leave it out."
        )
    if clipnorm is not None and global_clipnorm is not None:
        raise ConfigError(
            f"clipnorm={clipnorm!r} with global_clipnorm={global_clipnorm!r}: choose one of them; clipnorm looks at "
            "each variable, global_clipnorm at all together."
        )
    if gradient_accumulation_steps == 1:
        gradient_accumulation_steps = None  # one batch per update is no accumulation; Keras wants at least 2
    optional = {
        "weight_decay": weight_decay,
        "clipnorm": clipnorm,
        "global_clipnorm": global_clipnorm,
        "gradient_accumulation_steps": gradient_accumulation_steps,
    }
    kwargs.update({key: value for key, value in optional.items() if value is not None})
    if use_ema:
        kwargs.update(use_ema=True, ema_momentum=ema_momentum)
    _check_ranges(kwargs)
    rate = build_schedule(
        schedule,
        learning_rate=(default_rate if learning_rate is None else learning_rate) * rate_factor,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
    )

    # Here, not at the top: OPTIMIZERS must be known to processes that start without TensorFlow.
    import keras

    from tfdist.optimizers import lars, lazy  # as above

    home = lazy if name.startswith("lazy_") else lars if name == "lars" else keras.optimizers
    return getattr(home, class_name)(learning_rate=rate, **kwargs)


def _check_ranges(kwargs: dict[str, Any]) -> None:
    for key in ("momentum", "ema_momentum"):
        if not 0 <= kwargs.get(key, 0) < 1:
            raise ConfigError(f"{key}={kwargs[key]!r}: it must be at least 0 and less than 1.")
    for key in ("clipnorm", "global_clipnorm"):
        if not 0 < kwargs.get(key, 1) < math.inf:
            raise ConfigError(
                f"{key}={kwargs[key]!r}: it must be greater than 0 and finite; leave it out to clip nothing."
            )
    if not 0 <= kwargs.get("weight_decay", 0) < math.inf:
        raise ConfigError(f"weight_decay={kwargs['weight_decay']!r}: it must be 0 or more, and finite.")
    if kwargs.get("gradient_accumulation_steps", 2) < 1:
        raise ConfigError(
            f"gradient_accumulation_steps={kwargs['gradient_accumulation_steps']!r}: it must be 1 (every batch is an "
            "update) or more."
        )
