"""`python -m tfdist.plan`: tries a recipe's steps in all ways to train, and says what each will cost.

python -m tfdist.plan --recipe=digits_cnn
python -m tfdist.plan --recipe=my_recipe.py --hosts=a,b,c --global_batch_size=256
python -m tfdist.plan --recipe=digits_cnn --link=1gbit,1ms --workers=2,4,8 --simulate=1000
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tfdist.config.parser import canonical_flag
from tfdist.errors import ConfigError, TfdistError
from tfdist.planning.flags import build_parser, check_simulation, read_place, read_sizes
from tfdist.planning.link import parse_link
from tfdist.planning.predict import Plan
from tfdist.planning.simulate import draw_efficiency, render_efficiency, simulate
from tfdist.planning.table import render_best, render_table
from tfdist.planning.trials import make_trials
from tfdist.planning.ways import check_flags, parse_ways


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Without the program's name; None takes this process's own.

    Returns:
        0, 1 if a trial failed, 2 for a mistake in the settings, 130 if interrupted.
    """
    try:
        words = [canonical_flag(word) for word in (sys.argv[1:] if args is None else args)]
        flags, rest = build_parser(__doc__).parse_known_args(words)
        return _run(flags, rest)
    except TfdistError as error:
        print(f"tfdist.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("tfdist.plan: interrupted", file=sys.stderr)
        return 130


def _run(flags: argparse.Namespace, rest: Sequence[str]) -> int:
    place = read_place(flags)
    check_flags(rest)
    if flags.simulate is not None:
        check_simulation(flags, place)
    ways = parse_ways(flags.ways, is_linked=bool(flags.link))
    plan = Plan(ways, read_sizes(flags), parse_link(flags.link) if flags.link else None)
    make_trials(plan, place, rest, verbose=flags.verbose)
    predictions = plan.predict()
    curves = {}
    if flags.simulate is not None:
        curves = simulate(plan, most=flags.simulate, mtbf_days=flags.mtbf_days, seed=flags.seed)
        draw_efficiency(curves, Path(flags.picture))
    if flags.json:
        found = {
            "model": plan.alone.model,
            "ways": [p.to_dict() for p in predictions],
            "refused": plan.refusals(),
        }
        print(json.dumps(found | ({"efficiency": curves} if curves else {}), indent=2))
        return 0
    print(render_table(plan.alone.model, predictions), "", sep="\n")
    for name, why in plan.refusals().items():
        print(f"without {name}: {why}")
    print(render_best(predictions, plan.batch_size, rest, place))
    if curves:
        print("", render_efficiency(curves), f"the picture is in {flags.picture}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
