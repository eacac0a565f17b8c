"""A batch's micro-batches on their way through a stage: what comes in, what is computed, and what goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfdist.training.pipeline.links import Link
from tfdist.training.pipeline.schedule import SCHEDULES
from tfdist.training.pipeline.stage import MicroBatch, Stage

_SCALAR = tf.TensorSpec([], tf.float32)


class Passes:
    """Makes a stage's passes.

    Args:
        stage: This process's.
        place: Its number, and that of all stages.
        links: With the stage before and with the next.
        schedule: Name of a schedule.
        sum_copies: Adds a tensor up over the copies of the model; where there is one, it stays as it is.

    Attributes:
        waited_secs: How long this stage has had nothing to do, in all.
    """

    def __init__(
        self,
        stage: Stage,
        place: tuple[int, int],
        links: tuple[Link | None, Link | None],
        schedule: str,
        sum_copies: Callable[[tf.Tensor], tf.Tensor] = lambda values: values,
    ) -> None:
        self.waited_secs = 0.0
        self._stage = stage
        self._place = place
        self._before, self._after = links
        self._order = SCHEDULES[schedule]
        self._sum_copies = sum_copies

    def train(self, micros: Sequence[MicroBatch]) -> list[tuple[float, Any]]:
        """Makes forward and backward passes of all micro-batches, and sums their gradients in the stage.

        Returns:
            Of the last stage, each one's share and loss.
        """
        losses = []
        totals = self._count(micros)
        micros = _with_examples(micros)
        for is_forward, place in self._order(*self._place, len(micros)):
            micro = micros[place]
            if self._stage.is_last:
                if is_forward:
                    received, side_loss = self._receive_inputs(micro)
                    gradients, loss = self._stage.forward_and_backward(micro, received, side_loss, totals)
                    losses.append((micro.share, loss))
                    self._send_back(gradients)
            elif is_forward:
                received, side_loss = self._receive_inputs(micro)
                outputs, side_loss = self._stage.forward(micro, received, side_loss)
                self._send_on(outputs, side_loss)
            else:
                specs = [spec for spec in _specs(self._stage.layers.outputs, micro) if spec.dtype.is_floating]
                self._send_back(self._stage.backward(micro, self._receive(self._after, specs)))
        self._stage.gradients.end_batch()
        return losses

    def test(self, micros: Sequence[MicroBatch]) -> None:
        """Updates the last stage's metrics."""
        totals = self._count(micros)
        for micro in _with_examples(micros):
            received, side_loss = self._receive_inputs(micro)
            if self._stage.is_last:
                self._stage.test(micro, received, side_loss, totals)
            else:
                outputs, own_loss = self._stage.predict(micro, received)
                self._send_on(outputs, side_loss + own_loss)

    def predict(self, micros: Sequence[MicroBatch]) -> list[np.ndarray]:
        """Returns the outputs of the last stage, each with all of its examples; nothing where there are none."""
        found: list[Any] = []
        for micro in _with_examples(micros):
            received, side_loss = self._receive_inputs(micro)
            outputs, own_loss = self._stage.predict(micro, received)
            if self._stage.is_last:
                found.append([output.numpy() for output in outputs])
            else:
                self._send_on(outputs, side_loss + own_loss)
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _count(self, micros: Sequence[MicroBatch]) -> Any:
        if not self._stage.is_last:
            return None
        totals = self._stage.count(micros)
        return self._sum_copies(totals) if totals.shape[0] else totals

    def _receive_inputs(self, micro: MicroBatch) -> tuple[list[tf.Tensor], tf.Tensor]:
        if self._before is None:
            return [], tf.constant(0.0)
        *received, side_loss = self._receive(
            self._before, [*_specs(self._stage.layers.inputs, micro), _SCALAR]
        )
        return received, side_loss

    def _receive(self, link: Link | None, specs: Sequence[tf.TensorSpec]) -> list[tf.Tensor]:
        assert link is not None
        start = time.perf_counter()
        try:
            return link.receive(specs)
        finally:
            self.waited_secs += time.perf_counter() - start

    def _send_on(self, outputs: Sequence[Any], side_loss: Any) -> None:
        assert self._after is not None
        self._after.send([*outputs, side_loss])

    def _send_back(self, gradients: Sequence[Any]) -> None:
        if self._before is not None:
            self._before.send(gradients)


def _with_examples(micros: Sequence[MicroBatch]) -> list[MicroBatch]:
    return [micro for micro in micros if micro.num_examples]


def _specs(tensors: Sequence[keras.KerasTensor], micro: MicroBatch) -> list[tf.TensorSpec]:
    return [
        tf.TensorSpec([micro.num_examples, *tensor.shape[1:]], keras.backend.standardize_dtype(tensor.dtype))
        for tensor in tensors
    ]
