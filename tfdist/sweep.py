"""`python -m tfdist.sweep`: looks for the settings with which a recipe does best.

python -m tfdist.sweep --space=space.yaml --trials=20 --parallel=2 --recipe=digits_cnn --epochs=5
python -m tfdist.sweep --space=space.yaml --sweep_dir=sweeps/mine --metric=val_accuracy --strategy=ps
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tfdist.config.parser import canonical_flag
from tfdist.errors import ConfigError, TfdistError
from tfdist.sweeping.flags import build_parser


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Without the program's name; None takes this process's own.

    Returns:
        0, 2 for a mistake in the settings, 128 + n if signal n came.
    """
    try:
        flags, rest = build_parser(__doc__).parse_known_args(
            [canonical_flag(word) for word in (sys.argv[1:] if args is None else args)]
        )
        return _run(flags, rest)
    except TfdistError as error:
        print(f"tfdist.sweep: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(flags: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        # Here: Optuna takes a second to import, and `--help` none.
        from tfdist.sweeping.report import write_sweep_report
        from tfdist.sweeping.space import read_space
        from tfdist.sweeping.study import Sweep, SweepOptions
    except ModuleNotFoundError as error:
        raise ConfigError(f"a sweep needs {error.name}: pip install 'tfdist[sweep]'.") from None
    if not flags.space:
        raise ConfigError("space: name a file of the settings to try, by --space=space.yaml.")
    options = SweepOptions(
        folder=Path(flags.sweep_dir or f"sweeps/{datetime.datetime.now():%Y%m%d-%H%M%S}").expanduser(),
        space=read_space(flags.space),
        flags=rest,
        launch=shlex.split(flags.launch or ""),
        num_trials=flags.trials,
        num_parallel=flags.parallel,
        metric=flags.metric,
        direction=flags.direction or ("minimize" if "loss" in flags.metric else "maximize"),
        pruner=flags.pruner,
        grace_epochs=flags.grace_epochs,
        seed=flags.seed,
    )
    # At once, with its end: trials side by side speak from threads.
    sweep = Sweep(options, lambda line: print(f"{line}\n", end="", flush=True))
    print(
        f"sweep in {options.folder}: {len(sweep.finished)} of {options.num_trials} trials are done",
        flush=True,
    )
    told_by = None
    try:
        told_by = sweep.run()
    finally:
        if sweep.finished:
            print(write_sweep_report(sweep, options), flush=True)
    if told_by is not None:
        print("tfdist.sweep: interrupted; the same command with its --sweep_dir goes on", file=sys.stderr)
        return 128 + told_by
    if not sweep.finished:
        raise TfdistError(f"no trial came to its end; {options.folder} has what each has printed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
