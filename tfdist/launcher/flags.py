"""The command line of the launcher: its own flags, then somebody else's command, untouched."""

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfdist.cluster.spec import find_nearest
from tfdist.config.config_file import render_flags, take_config
from tfdist.config.job_options import TRAIN_DEFAULTS, JobOptions
from tfdist.config.parser import OneLineParser, add_settings
from tfdist.config.run_config import RunConfig
from tfdist.config.settings import settings_of, types_of
from tfdist.errors import ConfigError
from tfdist.launcher.backends import BACKENDS, Backend, choose_backend, count_workers
from tfdist.launcher.hosts import SshOptions, add_host_flags, read_hosts, read_ssh_options
from tfdist.launcher.job import Job, build_python_command, parse_num_workers

_USAGE = """\
python -m tfdist.launch [flags] script.py [its flags]
       python -m tfdist.launch [flags] -m module [its flags]
       python -m tfdist.launch [flags] -- program [its flags]

Starts a cluster, on this machine unless told otherwise, and runs the same command in each of its processes.

examples:
  python -m tfdist.launch --num_workers=2 --strategy=multiworker train.py --epochs=5
  python -m tfdist.launch --num_workers=2 --num_ps=1 --strategy=ps -m tfdist.train
  python -m tfdist.launch --num_workers=2 --num_ps=1 --dry_run train.py
  python -m tfdist.launch --num_workers=3 -- sh -c 'echo $TF_CONFIG'
  python -m tfdist.launch --slurm --nodes=4 --time=2:00:00 --strategy=multiworker train.py
  python -m tfdist.launch --kubernetes --image=registry/me/train:1 --num_workers=4 --gpus=1 train.py

With ps tasks there are 1 chief, the workers and the ps; without, worker 0 is the chief.
In flag names - and _ are the same.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchFlags:
    """What was asked for on the command line: to run a job, or only to show it, and where in what kind of place."""

    job: Job
    dry_run: bool
    backend: Backend
    place: Any


def parse_flags(args: Sequence[str], env: Mapping[str, str]) -> LaunchFlags:
    """Reads the launcher's command line.

    Args:
        args: Without the program's name.
        env: The environment that the tasks start from.

    Raises:
        ConfigError: If a flag is unknown or malformed, or the command is missing or does not exist.
    """
    own, mode, words = _take_config(*_split_command(args))
    flags = _PARSER.parse_args(own)
    defaults = {name: _PARSER.get_default(name) for name in vars(flags)}
    backend, place = choose_backend(vars(flags), defaults)
    hosts = read_hosts(flags.hosts, flags.hostfile)
    num_slots = sum(host.num_slots for host in hosts)
    default = str(num_slots) if hosts else count_workers(vars(flags), place)
    min_workers, num_workers = parse_num_workers(flags.num_workers or default)
    command = (_build_command if backend.holds_program else _build_command_for_elsewhere)(mode, words)
    if hosts and flags.python and command[0] == sys.executable:
        command[0] = flags.python
    job = Job(
        command=command,
        num_workers=num_workers,
        num_ps=flags.num_ps,
        strategy=flags.strategy,
        run_dir=os.path.abspath(os.path.expanduser(flags.run_dir)) if flags.run_dir else None,
        env=env,
        threads_per_task=flags.num_threads,
        min_workers=min_workers,
        hosts=hosts,
        ssh=read_ssh_options(flags),
        exchange=flags.exchange,
        preload=_PRELOAD if flags.preload else (),
        **{name: getattr(flags, name) for name in _OPTIONS},
    )
    return LaunchFlags(job=job, dry_run=flags.dry_run, backend=backend, place=place)


def _build_parser() -> OneLineParser:
    parser = OneLineParser(prog="tfdist.launch", usage=_USAGE, allow_abbrev=False, add_help=False)
    group = parser.add_argument_group("flags")
    add = group.add_argument
    add("--num_workers", "--nproc_per_node", "--num_proc", "-np", "-n", metavar="N",
        help="tasks that compute (default: 1, or all slots of --hosts); 2:4: at most 4, at least 2")  # fmt: skip
    add("--num_ps", type=int, metavar="N",
        help="tasks that hold variables (default: 1 with --strategy=ps, else 0)")  # fmt: skip
    add("--strategy", metavar="NAME", help="one_device, mirrored, multiworker or ps, handed to the tasks")
    add("--run_dir", metavar="DIR", help="folder of the run; each task's output is kept in DIR/logs")
    add("--num_threads", type=int, metavar="N", help="threads of each task (default: cores / workers)")
    add_host_flags(group, "run on these machines by ssh")
    add("--exchange", default="auto", metavar="NAME",
        help="what carries gradients: collective, mpi (needs mpi4py) or auto (default: auto)")  # fmt: skip
    for name in _OPTIONS:
        _add_option(group, name)
    add("--preload", action="store_true",
        help="import TensorFlow and Keras once, then fork the tasks of this machine: they start sooner. "
        "The script cannot set what TensorFlow reads at import")  # fmt: skip
    add("--config", metavar="FILE",
        help="YAML file of settings: the launcher's and those of tfdist.train, the default command then")  # fmt: skip
    add("--dry_run", action="store_true", help="show every TF_CONFIG and command, and start nothing")
    add("-m", "--module", metavar="MODULE", help="run a module, as python -m does")
    add("-h", "--help", action="help", help="show this text")
    for name, backend in BACKENDS.items():
        group = parser.add_argument_group(f"with --{name}")
        group.add_argument(f"--{name}", action="store_true", help=backend.help)
        add_settings(group, backend.kind)
    return parser


def _add_option(group: Any, name: str) -> None:
    field, rule = settings_of(JobOptions)[name]
    (kind,) = types_of(JobOptions)[name]
    text = rule.help
    if name in TRAIN_DEFAULTS:
        why = f"tfdist.train, whose tasks save and tell of their steps, has {TRAIN_DEFAULTS[name]:g}"
        text += f" Default: {field.default:g}; {why}."
    elif field.default not in (None, ""):
        text += f" Default: {field.default:g}."
    group.add_argument(f"--{name}", type=kind, default=field.default, metavar=_METAVARS[kind], help=text)


# What a program that calls `tfdist.initialize` imports.
_PRELOAD = ("tensorflow", "keras", "tfdist.api.initialize")
_METAVARS: dict[type, str] = {int: "N", float: "SECS", str: "TEXT"}
# A program of one's own does not know how to go on in another cluster.
_OPTIONS = [name for name in settings_of(JobOptions) if name != "elastic"]
_PARSER = _build_parser()
_SWITCHES = ("--dry_run", "--preload", "--help", "-h", *(f"--{name}" for name in BACKENDS))
_MODULE = ("-m", "--module")
_TRAIN = "tfdist.train"
_NOTHING_TO_RUN = "nothing to run: name script.py, -m module, or -- program, after the flags (see --help)"
_VALUED = (
    "--num_workers", "--nproc_per_node", "--num_proc", "-np", "-n", "--num_ps", "--strategy", "--run_dir",
    "--num_threads", "--hosts", "-H", "--hostfile", "-i", "--exchange", "--config",
    *(f"--{name}" for name in (*settings_of(SshOptions), *_OPTIONS)),
    *(f"--{name}" for backend in BACKENDS.values() for name in settings_of(backend.kind)),
)  # fmt: skip


def _split_command(args: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Cuts the command line into the launcher's flags, how to run the rest (`script`, `-m`, `--`), and the rest."""
    own: list[str] = []
    left = list(args)
    while left:
        word = left.pop(0)
        if word == "--":
            return own, "--", left
        if not word.startswith("-") or word == "-":
            return own, "script", [word, *left]
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if not name.startswith("--") else "--" + name[2:].replace("-", "_")
        if name in _MODULE:
            return own, "-m", [value, *left] if equals else left
        if name not in (*_SWITCHES, *_VALUED):
            nearest = find_nearest(name, (*_SWITCHES, *_VALUED, *_MODULE))
            hint = f"; did you mean {nearest}?" if nearest else ""
            raise ConfigError(f"unknown flag {word.partition('=')[0]}{hint} (see --help)")
        own.append(f"{name}={value}" if equals else name)
        if name in _VALUED and not equals:
            if not left or left[0].startswith("--"):
                raise ConfigError(f"flag {name} needs a value: write {name}=VALUE")
            own[-1] = f"{name}={left.pop(0)}" if name.startswith("--") else name
            if not name.startswith("--"):
                own.append(left.pop(0))
    return own, "script", []


def _take_config(own: Sequence[str], mode: str, words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Puts the settings of `--config` where they belong: some are the launcher's, all others `tfdist.train`'s."""
    switches = {name.lstrip("-") for name in _SWITCHES} - {"help", "h"}
    launchers = switches | {name.lstrip("-") for name in _VALUED}
    settings, rest = take_config(own, {*launchers, *settings_of(RunConfig), "set"})
    if not settings:
        return rest, mode, list(words)
    ours = {name: value for name, value in settings.items() if name in launchers - switches}
    turned_on = [f"--{name}" for name in switches if settings.get(name) is True]
    others = {name: value for name, value in settings.items() if name not in launchers}
    if not words:
        mode, words = "-m", [_TRAIN]
    if mode == "-m" and words[0] == _TRAIN:
        words = [_TRAIN, *render_flags(others), *words[1:]]
    elif others:
        raise ConfigError(
            f"config: {', '.join(sorted(others))} are settings of {_TRAIN}, and the command is another; leave them out."
        )
    return [*turned_on, *render_flags(ours), *rest], mode, list(words)


def _build_command_for_elsewhere(mode: str, words: Sequence[str]) -> list[str]:
    """The image holds the program, so nothing can be looked up here."""
    if not words or not words[0]:
        raise ConfigError(_NOTHING_TO_RUN)
    is_python = mode == "-m" or mode == "script" and words[0].endswith(".py")
    return [*(["python"] if is_python else []), *(["-m"] if mode == "-m" else []), *words]


def _build_command(mode: str, words: Sequence[str]) -> list[str]:
    if not words or not words[0]:
        raise ConfigError(_NOTHING_TO_RUN)
    if mode == "-m":
        _check_module(words[0])
        return build_python_command(words, module=True)
    path = Path(words[0])
    is_program = os.access(path, os.X_OK) and os.sep in words[0] and path.suffix != ".py"
    is_script = path.is_file() and not is_program and mode == "script"
    if is_script or path.is_dir() and (path / "__main__.py").is_file():
        return build_python_command(words)
    if path.suffix == ".py":
        if path.is_file():
            return build_python_command(words)
        siblings = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
        nearest = find_nearest(path.name, siblings)
        hint = f"did you mean {str(path.parent / nearest)!r}?" if nearest else "correct the path"
        raise ConfigError(f"script {words[0]!r} does not exist: {hint}")
    if shutil.which(words[0]) is None:
        raise ConfigError(
            f"{words[0]!r} is neither a script nor a program on the PATH: correct it (see --help)"
        )
    return list(words)


def _check_module(name: str) -> None:
    top = name.partition(".")[0]
    try:
        # Only the top package: looking deeper would import it.
        found = importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise ConfigError(f"module {name!r} does not exist: no {top!r} can be imported from here")
