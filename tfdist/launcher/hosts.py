"""The machines of a job: read as `h1:2,h2:4` or from a host file, how ssh gets there, and which task goes where."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfdist.cluster.spec import Task
from tfdist.config.parser import add_settings
from tfdist.config.settings import setting, settings_of
from tfdist.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """A machine, by the name that ssh and the other machines know, and how many workers it may run."""

    name: str
    num_slots: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SshOptions:
    """How other machines are reached: the flags that every command has beside --hosts."""

    ssh_port: int | None = setting(None, help="Port of sshd. Default: as ssh is configured.")
    identity_file: str | None = setting(None, help="Private key for ssh. Default: as ssh is configured.")
    ssh_config: str | None = setting(None, help="Configuration of ssh in place of the user's own.")
    python: str | None = setting(
        None, help="The hosts' Python, which has tfdist. Default: the path of this one."
    )


def add_host_flags(parser: Any, what: str) -> None:
    """Adds to a parser of argparse, or a group of one, the flags that say on which hosts to do something."""
    parser.add_argument("--hosts", "-H", metavar="LIST", help=f"{what}: h1:2,h2:4, with slots for workers")
    parser.add_argument(
        "--hostfile", metavar="FILE", help="the same from a file: a line `h1 slots=2` for each"
    )
    add_settings(parser, SshOptions, short={"identity_file": "-i"})


def read_ssh_options(flags: Any) -> SshOptions:
    """Takes what a parsed command line says of ssh."""
    return SshOptions(**{name: getattr(flags, name) for name in settings_of(SshOptions)})


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Reads a list of hosts, as horovodrun's `-H`.

    Args:
        text: `h1:2,h2:4`; a host without a number has one slot. An IPv6 address with a number stands in brackets:
            `[fd00::1]:2`.

    Raises:
        ConfigError: If a name or number is missing, or a host comes twice.
    """
    return _checked([_parse_host(word.strip()) for word in text.split(",")], text)


def parse_host_file(text: str) -> tuple[Host, ...]:
    """Reads a host file of horovodrun or Open MPI: a host a line, `slots=N` after it; `#` begins a comment.

    Raises:
        ConfigError: If a line is something else, or a host comes twice.
    """
    hosts = []
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        settings = dict(word.partition("=")[::2] for word in words[1:])
        if set(settings) - {"slots", "max_slots", "max-slots"}:
            raise ConfigError(f"host file: {line.strip()!r}: write a line as `host slots=N`")
        name = _parse_host(words[0])
        hosts.append(
            Host(name=name.name, num_slots=_parse_slots(settings.get("slots", name.num_slots), line))
        )
    return _checked(hosts, text)


def read_hosts(listed: str | None, file: str | None) -> tuple[Host, ...]:
    """Reads the hosts of a command line, listed or from a host file; none if neither is given.

    Raises:
        ConfigError: If both are given, or what is given cannot be read.
    """
    if listed and file:
        raise ConfigError(f"hosts {listed!r} and hostfile {file!r}: give one of them")
    if listed:
        return parse_hosts(listed)
    if not file:
        return ()
    try:
        return parse_host_file(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile {file!r} cannot be read ({error}): correct the path") from None


def place_tasks(tasks: Sequence[Task], hosts: Sequence[Host]) -> Mapping[Task, Host]:
    """Says on which host each task runs: the chief on the first, ps in turn, workers by the hosts' slots.

    Raises:
        ConfigError: If there are fewer slots than workers.
    """
    slots = [host for host in hosts for _ in range(host.num_slots)]
    num_workers = sum(task.type == "worker" for task in tasks)
    if num_workers > len(slots):
        names = ", ".join(f"{host.name}:{host.num_slots}" for host in hosts) or "none"
        raise ConfigError(
            f"{num_workers} workers for {len(slots)} slots ({names}): ask for fewer, or give the hosts more slots"
        )
    places = {"worker": slots, "chief": hosts, "ps": hosts}
    return {task: places[task.type][task.index % len(places[task.type])] for task in tasks}


def _parse_host(word: str) -> Host:
    if word.startswith("["):
        name, _, rest = word[1:].partition("]")
    elif word.count(":") > 1:  # an IPv6 address without a number
        name, rest = word, ""
    else:
        name, colon, number = word.partition(":")
        rest = colon + number
    if not name or name.startswith("-") or (rest and not rest.startswith(":")):
        raise ConfigError(f"host {word!r}: write name:slots, such as h1:2,h2:4")
    return Host(name=name, num_slots=_parse_slots(rest[1:] if rest else 1, word))


def _parse_slots(value: str | int, where: str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"host {where.strip()!r}: {value!r} slots: it must be a number of at least 1")
    return int(value)


def _checked(hosts: Sequence[Host], text: str) -> tuple[Host, ...]:
    names = [host.name for host in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"host {twice[0]!r} comes twice: give it all its slots at once, as {twice[0]}:2")
    if not hosts:
        raise ConfigError(f"no hosts in {text!r}: name at least one, such as h1:2,h2:2")
    return tuple(hosts)
