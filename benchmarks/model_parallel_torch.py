"""The contender `torch` of `model_parallel.py`: a transformer like `text_lm` in two stages, by torch's own pipelining.

model_parallel_torch.py OUT.json RANK PORT LAYERS WIDTH HEADS BATCH STEPS MICRO_BATCHES VOCABULARY LENGTH: 1F1B over
gloo, one core a process; the last stage writes the seconds of a step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

OUT, RANK, PORT, *NUMBERS = sys.argv[1:]
LAYERS, WIDTH, HEADS, BATCH, STEPS, MICRO_BATCHES, VOCABULARY, LENGTH = map(int, NUMBERS)
os.sched_setaffinity(0, {int(RANK)})

import torch  # noqa: E402 - after pinning
from torch import nn  # noqa: E402 - after pinning
from torch.distributed.pipelining import PipelineStage, Schedule1F1B  # noqa: E402 - after pinning


class Block(nn.Module):
    """Attention without biases, and a feed-forward part, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        """Returns features of the same shape."""
        batch, length, _ = x.shape
        parts = self.qkv(self.first(x)).view(batch, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        hidden = nn.functional.gelu(self.up(self.second(x)), approximate="tanh")
        return x + self.down(hidden)


class Half(nn.Module):
    """One stage: the first looks characters up, the last makes logits; the table is not tied, which costs less."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.is_first = rank == 0
        if self.is_first:
            self.table, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        else:
            self.norm, self.logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS // 2)))

    def forward(self, x: Any) -> Any:
        """Returns features, or logits."""
        if self.is_first:
            return self.blocks(self.table(x) * WIDTH**0.5 + self.places(torch.arange(LENGTH)))
        return self.logits(self.norm(self.blocks(x)))


def main() -> None:
    """Trains three rounds, of which the first warms up."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", rank=int(RANK), world_size=2)
    torch.manual_seed(0)
    half = Half(int(RANK))
    stage = PipelineStage(half, int(RANK), 2, torch.device("cpu"))

    def loss(logits: Any, labels: Any) -> Any:
        return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1))

    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss)
    optimizer = torch.optim.AdamW(half.parameters(), 3e-3, weight_decay=0.01)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    secs = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            if RANK == "0":
                schedule.step(ids[:, :-1])
            else:
                schedule.step(target=ids[:, 1:].contiguous(), losses=[])
            optimizer.step()
        secs.append((time.perf_counter() - start) / STEPS)
    torch.distributed.destroy_process_group()
    if RANK == "1":
        Path(OUT).write_text(json.dumps({"step_secs": min(secs[1:])}))


if __name__ == "__main__":
    main()
