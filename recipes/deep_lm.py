"""`text_lm` at a size that one machine does not hold: to be divided, by layers, in blocks, or both.

    python -m tfdist.train --recipe=deep_lm --strategy=pipeline --num_stages=2 --tensor_parallel=2

`--set num_layers=24 --set width=1024 --set num_heads=16` make 300 million weights of it, which with gradients and
AdamW's slots are 4.8 GB, of which each of these four processes has a quarter. As it is here, for a first try, it is
small.
"""

from __future__ import annotations

import keras

from tfdist.recipe import Recipe

from .text_lm import build_data
from .text_lm import build_model as build_text_lm


def build_model(
    *,
    num_layers: int = 8,
    width: int = 64,
    num_heads: int = 4,
    dropout: float = 0.0,
    learning_rate: float = 1e-3,
    clip_norm: float = 1.0,
    sequence_length: int = 128,
    seed: int = 0,
) -> keras.Model:
    """Builds `text_lm`'s transformer, compiled such that it trains at any depth.

    Args:
        num_layers: Blocks of attention and a feed-forward part.
        width: Features per character.
        num_heads: Attention heads; must divide `width`.
        dropout: Share dropped of what each part adds.
        learning_rate: AdamW's rate.
        clip_norm: The most that the norm of all gradients may be; it is counted over all processes.
        sequence_length: Characters per example; the data takes the same.
        seed: Of the dropout masks.

    Returns:
        A model from ids `[batch, sequence_length]` to the next character's logits.

    Raises:
        ConfigError: If `num_heads` does not divide `width`.
    """
    model = build_text_lm(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        dropout=dropout,
        learning_rate=learning_rate,
        sequence_length=sequence_length,
        seed=seed,
    )
    model.optimizer.global_clipnorm = clip_norm
    return model


RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=16, epochs=3)
