"""The flags of `python -m tfdist.sweep`."""

from __future__ import annotations

from typing import Any

from tfdist.config.parser import OneLineParser


def build_parser(usage: str | None) -> OneLineParser:
    """Makes the command's parser."""
    parser = OneLineParser(prog="tfdist.sweep", usage=usage, allow_abbrev=False)
    add: Any = parser.add_argument
    add("--space", metavar="FILE",
        help="YAML: name → list of choices, or {low, high, step, log}; set.NAME for a recipe's")  # fmt: skip
    add("--trials", type=_positive, default=20, metavar="N",
        help="trials in all, earlier ones included (default: 20)")  # fmt: skip
    add("--parallel", type=_positive, default=1, metavar="N", help="trials at once (default: 1)")
    add("--metric", default="val_loss",
        help="what is to be the best, as in metrics.jsonl (default: val_loss)")  # fmt: skip
    add("--direction", choices=("minimize", "maximize"),
        help="default: a loss is minimized, all else maximized")  # fmt: skip
    add("--pruner", choices=("asha", "hyperband", "none"), default="asha",
        help="what ends bad trials early (default: asha)")  # fmt: skip
    add("--grace_epochs", type=_positive, default=1, metavar="N",
        help="before that none is ended (default: 1)")  # fmt: skip
    add("--sweep_dir", metavar="DIR",
        help="folder of the sweep; an earlier one is gone on with (default: sweeps/TIME)")  # fmt: skip
    add("--seed", type=int, default=0, help="of what is tried (default: 0)")
    add("--launch", metavar="FLAGS",
        help="flags of tfdist.launch for each run, in one word: '--slurm --nodes=2'")  # fmt: skip
    parser.epilog = "All other flags are those of tfdist.train, for every trial."
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
