"""The contender `torch` of `sync.py`: DistributedDataParallel over gloo. Run as `… WAY CONTEST OUT WEIGHTS RANK PORT`.

WAY: `plain`, `best` (channels-last and fused Adam), or `allreduce`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sync_models import CONTESTS, EPSILON, LEARNING_RATE, MLP_LAYERS, MLP_WIDTH, WARM_STEPS, build_data, pin

WAY, CONTEST, OUT, WEIGHTS, RANK, PORT = sys.argv[1:]
pin(int(RANK))

import numpy as np  # noqa: E402 - after pinning
import torch  # noqa: E402 - after pinning
from torch import nn  # noqa: E402 - after pinning

NUM_TRIES = 12


def build_model() -> nn.Module:
    """Returns the model with the weights that all contenders begin with."""
    with np.load(WEIGHTS) as stored:
        weights = [torch.from_numpy(stored[f"w{i}"].copy()) for i in range(len(stored.files))]
    if CONTEST == "cnn":
        relu, pool = nn.ReLU(), nn.MaxPool2d(2)
        parts = [nn.Conv2d(1, 32, 3), relu, pool, nn.Conv2d(32, 64, 3), relu, pool]
        model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(1600, 128), relu, nn.Linear(128, 10))
    else:
        sizes = [CONTESTS[CONTEST].shape[0], *[MLP_WIDTH] * MLP_LAYERS]
        pairs = zip(sizes, sizes[1:], strict=False)
        model = nn.Sequential(
            *(m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())), nn.Linear(MLP_WIDTH, 10)
        )
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            if weight.ndim == 4:
                weight = weight.permute(3, 2, 0, 1)
            elif (
                weight.ndim == 2 and weight.shape[0] == 1600
            ):  # rows, columns, channels → channels, rows, columns
                weight = weight.reshape(5, 5, 64, 128).permute(2, 0, 1, 3).reshape(1600, 128).T
            elif weight.ndim == 2:
                weight = weight.T
            parameter.copy_(weight)
    return model


def train() -> dict[str, float]:
    """Trains."""
    world, rank = torch.distributed.get_world_size(), int(RANK)
    images = CONTEST == "cnn"
    model: Any = build_model()
    if WAY == "best" and images:
        model = model.to(memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(model)
    fused = {"fused": True} if WAY == "best" else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=EPSILON, **fused)
    x, y = build_data(CONTEST)
    inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if images else x)
    if WAY == "best" and images:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(y)
    batch = CONTESTS[CONTEST].global_batch
    own = batch // world
    num_steps = 0

    def step(number: int) -> None:
        nonlocal num_steps
        num_steps += 1
        # Keras adds epsilon before the correction of the bias, torch behind it.
        optimizer.param_groups[0]["eps"] = EPSILON / (1 - 0.999**num_steps) ** 0.5
        start = number * batch + rank * own
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(inputs[start : start + own]), labels[start : start + own]
        ).backward()
        optimizer.step()

    for number in range(WARM_STEPS):
        step(number)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(inputs[:512]), labels[:512]))
    torch.distributed.barrier()
    step(0)
    start = time.perf_counter()
    for number in range(1, CONTESTS[CONTEST].num_steps):
        step(number)
    steps = CONTESTS[CONTEST].num_steps - 1
    return {"rate": steps * batch / (time.perf_counter() - start), "loss": loss}


def time_all_reduce() -> dict[str, float]:
    """Returns the milliseconds of gloo's all-reduce."""
    found = {}
    for num_bytes in (64 * 2**20, 2**20, 10 * 2**10):
        flat = torch.zeros(num_bytes // 4)
        secs = []
        for _ in range(2 + NUM_TRIES):
            start = time.perf_counter()
            torch.distributed.all_reduce(flat)
            secs.append(time.perf_counter() - start)
        found[str(num_bytes)] = 1e3 * float(np.median(secs[2:]))
    return found


torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=int(RANK), world_size=2
)
figures = time_all_reduce() if WAY == "allreduce" else train()
if RANK == "0":
    Path(OUT).write_text(json.dumps(figures))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
# Its threads abort a process at its end now and then, when all is done and written.
os._exit(0)
