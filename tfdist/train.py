"""`python -m tfdist.train`: trains, evaluates, predicts or exports a recipe under any strategy.

python -m tfdist.train                               # digits_cnn on this machine
python -m tfdist.train --strategy=ps --num_workers=2 # a local cluster is started
python -m tfdist.train --recipe=wide_deep --set data=breast_cancer --epochs=3
python -m tfdist.train --mode=eval --run_dir=runs/my_run
python -m tfdist.train --list_recipes
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tfdist.cluster.spec import CLUSTER_STRATEGIES
from tfdist.commands.cluster_run import run_cluster
from tfdist.commands.flags import collect_settings, parse_flags, settle_words
from tfdist.commands.own_part import run_own_part
from tfdist.commands.place import let_the_chief_speak, render_place, settle_place
from tfdist.config.config_file import render_config_file
from tfdist.config.run_dir import write_named
from tfdist.errors import ConfigError, NonFiniteError, OutOfMemoryError, TfdistError
from tfdist.recipe import list_recipes


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 2 for a mistake in the settings, else the failed task's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    cluster = None
    try:
        words = settle_words(words)
        values = parse_flags(words)
        if values.help:
            print(f"{__doc__}\n{values.get_help()}")
            return 0
        if values.list_recipes:
            print("\n".join(f"{name:<14} {line}" for name, line in list_recipes()))
            return 0
        if values.write_config:
            _write_config(values)
            return 0
        cluster, fields = settle_place(values)
        if fields["strategy"] in CLUSTER_STRATEGIES and cluster is None:
            return run_cluster(words, fields, values)
        if values.dry_run:
            print(render_place(cluster))
            return 0
        run_own_part(fields, cluster)
        return 0
    except (NonFiniteError, OutOfMemoryError) as error:
        let_the_chief_speak(cluster)
        print(f"tfdist.train: {error}", file=sys.stderr)
        return 1
    except (TfdistError, flags.Error) as error:
        let_the_chief_speak(cluster)
        print(f"tfdist.train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tfdist.train: interrupted", file=sys.stderr)
        return 130


def _write_config(values: flags.FlagValues) -> None:
    path = Path(values.write_config).expanduser()
    if path.exists():
        raise ConfigError(f"write_config={str(path)!r} exists; name another file, or remove it.")
    write_named(path, render_config_file(collect_settings(values)), flag="write_config")
    print(f"the settings are in {path}; python -m tfdist.train --config={path} takes them")


if __name__ == "__main__":
    sys.exit(main())
