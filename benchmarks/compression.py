"""PowerSGD or top-k: where `text_lm` ends when two workers send as few bytes by either, with error feedback.

    python benchmarks/compression.py [--rounds=3] [--write=docs/benchmarks.md]

Two workers' gradients are computed and compressed in one process, one round a seed. Top-k sends values and places, and
adds up what all have sent (Lin et al. 2017); its k is what the bytes of PowerSGD's two factors pay for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import keras
import numpy as np
import tensorflow as tf
from figures import ROOT, parse_options, render_spread, show

sys.path.insert(0, str(ROOT))
from recipes import text_lm

STEPS, PART, WORKERS, RANKS = 800, 16, 2, (4, 1)
MODEL = {"num_layers": 1, "width": 64, "sequence_length": 64}


class Whole:
    """Sends everything."""

    def __init__(self, variables: Sequence[keras.Variable], rank: int) -> None:
        self._rank = rank
        sides = [(v.shape[0], int(np.prod(v.shape[1:]))) if v.ndim > 1 else None for v in variables]
        self._sides = [s if s and min(s) > rank else None for s in sides]
        self._memories = [
            [tf.Variable(tf.zeros(s)) if s else None for s in self._sides] for _ in range(WORKERS)
        ]
        rng = np.random.default_rng(0)
        self._bases = [
            tf.Variable(rng.normal(size=(s[1], rank)).astype(np.float32)) if s else None for s in self._sides
        ]
        full = sum(int(np.prod(v.shape)) for v in variables)
        thin = sum(
            rank * sum(s) if s else int(np.prod(v.shape)) for s, v in zip(self._sides, variables, strict=True)
        )
        self.share = thin / full

    def mean(self, gradients: Sequence[Sequence[Any]]) -> list[Any]:
        """Returns what the workers take for the mean of their gradients."""
        return [
            self._mean(place, parts) if self._sides[place] else tf.add_n(parts) / WORKERS
            for place, parts in enumerate(zip(*gradients, strict=True))
        ]

    def _mean(self, place: int, parts: Sequence[Any]) -> Any:
        del place
        return tf.add_n(parts) / WORKERS

    def _with_memory(self, place: int, parts: Sequence[Any]) -> list[Any]:
        sides = self._sides[place]
        return [tf.reshape(p, sides) + self._memories[w][place] for w, p in enumerate(parts)]


class PowerSgd(Whole):
    """Sends two thin factors of each matrix."""

    def _mean(self, place: int, parts: Sequence[Any]) -> Any:
        own = self._with_memory(place, parts)
        base = self._bases[place]
        left, _ = tf.linalg.qr(tf.add_n([tf.matmul(m, base) for m in own]) / WORKERS)
        right = tf.add_n([tf.matmul(m, left, transpose_a=True) for m in own]) / WORKERS
        base.assign(right)
        mean = tf.matmul(left, right, transpose_b=True)
        for worker, matrix in enumerate(own):
            self._memories[worker][place].assign(matrix - mean)
        return tf.reshape(mean, parts[0].shape)


class TopK(Whole):
    """Sends the largest entries of each matrix, and their places."""

    def _mean(self, place: int, parts: Sequence[Any]) -> Any:
        sides = self._sides[place]
        count = max(1, self._rank * sum(sides) // 2)  # a place takes as many bytes as a value
        sent = []
        for worker, matrix in enumerate(self._with_memory(place, parts)):
            flat = tf.reshape(matrix, [-1])
            places = tf.math.top_k(tf.abs(flat), count, sorted=False).indices
            part = tf.scatter_nd(places[:, None], tf.gather(flat, places), flat.shape)
            self._memories[worker][place].assign(tf.reshape(flat - part, sides))
            sent.append(part)
        return tf.reshape(tf.add_n(sent) / WORKERS, parts[0].shape)


def train(kind: type[Whole], rank: int, seed: int) -> tuple[float, float]:
    """Returns the evaluation loss, and the share of the bytes that crosses."""
    keras.utils.set_random_seed(seed)
    model = text_lm.build_model(seed=seed, **MODEL)
    data, test = (
        text_lm.build_data(split, sequence_length=MODEL["sequence_length"]) for split in ("train", "test")
    )
    variables = model.trainable_variables
    model.optimizer.build(variables)
    sharing = kind(variables, rank)

    @tf.function(autograph=False)
    def step(ids: Any, wanted: Any) -> None:
        gradients = []
        for part in range(WORKERS):
            rows = slice(part * PART, (part + 1) * PART)
            with tf.GradientTape() as tape:
                loss = model.compute_loss(y=wanted[rows], y_pred=model(ids[rows], training=True))
            found = tape.gradient(loss, [v.value for v in variables])
            gradients.append([tf.convert_to_tensor(gradient) for gradient in found])
        model.optimizer.apply(sharing.mean(gradients), variables)

    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = rng.integers(0, len(data[0]), WORKERS * PART)
        step(tf.constant(data[0][rows]), tf.constant(data[1][rows]))
    return model.evaluate(*test, verbose=0, batch_size=64)[0], sharing.share


def main() -> None:
    """Measures, prints the table and, if asked, keeps it."""
    options = parse_options(str(__doc__), rounds=3)
    rows = []
    whole = [train(Whole, 1, seed)[0] for seed in range(options.rounds)]
    rows.append(("all gradients: evaluation loss", render_spread(whole), ""))
    for rank in RANKS:
        for name, kind in (("PowerSGD", PowerSgd), ("top-k", TopK)):
            found = [train(kind, rank, seed) for seed in range(options.rounds)]
            losses = render_spread([loss for loss, _ in found])
            rows.append((f"{name}, 1/{1 / found[0][1]:.0f} of the bytes (rank {rank})", losses, ""))
    note = f"{STEPS} steps of a small `text_lm`, two workers in one process, one round a seed."
    show("Compression", rows, options, note=note)


if __name__ == "__main__":
    main()
