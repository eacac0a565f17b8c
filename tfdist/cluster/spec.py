"""Which processes exist: the value types `Task` and `Cluster`, and TF_CONFIG in both directions.

Nothing here loads TensorFlow, reads the environment or writes it.
"""

import dataclasses
import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tfdist.errors import ClusterError, ConfigError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
ROLES = ("chief", "worker", "ps")
EVALUATOR = "evaluator"

STRATEGIES = ("one_device", "mirrored", "multiworker", "ps", "pipeline")
# Those whose processes need a cluster.
CLUSTER_STRATEGIES = ("multiworker", "ps", "pipeline")
STRATEGY_ALIASES = {
    "onedevice": "one_device",
    "single": "one_device",
    "mirror": "mirrored",
    "mwms": "multiworker",
    "multi_worker": "multiworker",
    "multi_worker_mirrored": "multiworker",
    "multiworker_mirrored": "multiworker",
    "parameter_server": "ps",
    "pss": "ps",
}

_HOST = re.compile(r"[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.%]+\]")
_logger = logging.getLogger("tfdist")


def find_nearest(name: str, choices: Iterable[str]) -> str | None:
    """Finds the choice that a mistyped name most likely meant; None if nothing is near."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def canonical_strategy(name: str) -> str:
    """Maps a name or an alias to one of `STRATEGIES`; case does not matter, `-` and `_` are the same.

    Raises:
        ConfigError: If the name is unknown; the message holds the nearest known one.
    """
    key = name.strip().lower().replace("-", "_").removesuffix("_strategy").removesuffix("strategy")
    key = STRATEGY_ALIASES.get(key, key)
    if key in STRATEGIES:
        return key
    nearest = find_nearest(key, [*STRATEGIES, *STRATEGY_ALIASES])
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    raise ConfigError(f"unknown strategy {name!r}{hint} (one of: {', '.join(STRATEGIES)})")


@dataclasses.dataclass(frozen=True, order=True)
class Task:
    """One process of a cluster, named as in TF_CONFIG.

    Args:
        type: `chief`, `worker`, `ps`, or `evaluator` (which lives outside the cluster).
        index: 0 for the first task of its type.

    Examples:
        >>> import tfdist
        >>> str(tfdist.Task("worker", 1))
        'worker:1'
    """

    type: str
    index: int

    def __post_init__(self) -> None:
        if self.type not in (*ROLES, EVALUATOR):
            raise ClusterError(_unknown_role_message(self.type))
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise ClusterError(
                f"index {self.index!r} of {self.type!r}: a task's index is a whole number from 0; correct it"
            )

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """All tasks and their addresses, and which of them this process is.

    Args:
        addresses: Role → `host:port` of its tasks, by index. Empty: this process is alone.
        task: This process, or None where the cluster is seen from outside (by a launcher).

    Raises:
        ClusterError: If the description contradicts itself.

    Examples:
        >>> import tfdist
        >>> cluster = tfdist.Cluster(
        ...     addresses={"worker": ("h1:2222", "h2:2222")}, task=tfdist.Task("worker", 0)
        ... )
        >>> cluster.num_workers, cluster.is_chief
        (2, True)
    """

    addresses: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    task: Task | None = None

    def __post_init__(self) -> None:
        unknown = [role for role in self.addresses if role not in ROLES]
        if unknown:
            raise ClusterError(_unknown_role_message(unknown[0]))
        # One order and no empty roles, so that equal clusters compare, hash and render equally.
        ordered = {role: tuple(self.addresses[role]) for role in ROLES if self.addresses.get(role)}
        object.__setattr__(self, "addresses", ordered)
        _check_addresses(ordered)
        if self.task is not None and self.task.type != EVALUATOR:
            self.address(self.task)  # which it must have

    def __hash__(self) -> int:
        return hash((tuple(self.addresses.items()), self.task))

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Every task of the cluster: chief, workers, then ps."""
        return tuple(Task(role, i) for role, hosts in self.addresses.items() for i in range(len(hosts)))

    @property
    def num_workers(self) -> int:
        """How many `worker` tasks there are; a `chief` is not counted."""
        return len(self.addresses.get("worker", ()))

    @property
    def num_ps(self) -> int:
        """How many tasks hold variables."""
        return len(self.addresses.get("ps", ()))

    @property
    def is_local(self) -> bool:
        """Whether there is no cluster at all, just this process."""
        return not self.addresses

    @property
    def hosts(self) -> list[str]:
        """The hosts of all tasks, each once, in order of their names."""
        return sorted({split_address(address)[0] for tasks in self.addresses.values() for address in tasks})

    @property
    def is_loopback(self) -> bool:
        """Whether every task has an address that only this machine can reach."""
        return bool(self.hosts) and all(host in _LOOPBACK for host in self.hosts)

    @property
    def is_single(self) -> bool:
        """Whether at most one process takes part."""
        return len(self.tasks) <= 1

    @property
    def usual_strategy(self) -> str:
        """The strategy where nobody says which."""
        if self.num_ps:
            return "ps"
        return "one_device" if self.is_single else "multiworker"

    @property
    def chief(self) -> Task | None:
        """The task that writes: `chief:0`, or `worker:0` where no task is named chief; None if local."""
        return self.tasks[0] if self.tasks and self.tasks[0].type != "ps" else None

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes."""
        return self.is_local or (self.task is not None and self.task == self.chief)

    def only_serves(self, strategy: str) -> bool:
        """Says whether this process runs no program of its own, but what a `ps` run's chief sends it.

        Args:
            strategy: Canonical name.
        """
        return strategy == "ps" and self.task is not None and self.task.type != "chief"

    def address(self, task: Task) -> str:
        """Finds where a task listens.

        Args:
            task: A task of this cluster.

        Returns:
            `host:port`.

        Raises:
            ClusterError: If the cluster has no such task.
        """
        hosts = self.addresses.get(task.type, ())
        if task.index >= len(hosts):
            raise ClusterError(_missing_task_message(self.addresses, task))
        return hosts[task.index]

    def with_task(self, task: Task | None) -> "Cluster":
        """Makes the same cluster, seen by another of its tasks.

        Args:
            task: The process that looks at it.

        Returns:
            A new cluster.
        """
        return Cluster(addresses=self.addresses, task=task)


def parse_tf_config(text: str) -> Cluster:
    """Reads the value of TF_CONFIG.

    `master` is taken for `chief`, and an evaluator is left out of the cluster (it would hang ps training);
    both with a logged warning.

    Args:
        text: JSON: `{"cluster": {"worker": ["host:port", …], …}, "task": {"type": "worker", "index": 0}}`.

    Returns:
        The cluster; a local one where the text names neither addresses nor a task.

    Raises:
        ClusterError: If the text is malformed or contradicts itself.

    Examples:
        >>> import tfdist
        >>> cluster = tfdist.parse_tf_config(
        ...     '{"cluster": {"worker": ["h1:2222", "h2:2222"]}, "task": {"type": "worker", "index": 1}}'
        ... )
        >>> str(cluster.task), cluster.num_workers
        ('worker:1', 2)
    """
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ClusterError(
            f"TF_CONFIG {_shorten(text)!r} is not JSON ({error.msg}, character {error.pos}): "
            'write {"cluster": {...}, "task": {...}} with double quotes'
        ) from None
    if not isinstance(config, dict):
        raise ClusterError(
            f"TF_CONFIG {_shorten(text)!r} is a JSON {type(config).__name__}, not an object: "
            'write {"cluster": {...}, "task": {...}}'
        )
    addresses = _parse_addresses(config.get("cluster") or {})
    if not addresses:
        if config.get("task"):
            raise ClusterError(
                f"TF_CONFIG names the task {json.dumps(config['task'])} of no cluster: whoever is one of several would "
                'train alone; give it a "cluster" with the addresses of all'
                + (
                    " (Kubeflow writes a sparseCluster for enableDynamicWorker: true, under which a task does not know "
                    "the others: leave that out)"
                    if "sparseCluster" in config
                    else ", or take the task out"
                )
            )
        return Cluster()
    return Cluster(addresses=addresses, task=_parse_task(config.get("task"), addresses))


def render_tf_config(cluster: Cluster) -> str:
    """Writes a cluster as the value of TF_CONFIG; `parse_tf_config` undoes it exactly.

    Args:
        cluster: The cluster, with the task whose TF_CONFIG this is.

    Returns:
        One line of JSON.

    Raises:
        ClusterError: If the cluster has addresses but no task.

    Examples:
        >>> import tfdist
        >>> cluster = tfdist.Cluster(addresses={"worker": ("h1:2222",)}, task=tfdist.Task("worker", 0))
        >>> tfdist.render_tf_config(cluster)
        '{"cluster": {"worker": ["h1:2222"]}, "task": {"type": "worker", "index": 0}}'
    """
    if cluster.is_local:
        return "{}"
    if cluster.task is None:
        raise ClusterError(
            "a cluster without a task has no TF_CONFIG: choose one with cluster.with_task(task)"
        )
    hosts = {role: list(addresses) for role, addresses in cluster.addresses.items()}
    return json.dumps({"cluster": hosts, "task": dataclasses.asdict(cluster.task)})


def check_strategy(cluster: Cluster, strategy: str) -> None:
    """Checks that a strategy, by any of its names, can run on a cluster, local or not.

    Raises:
        ClusterError: If the cluster lacks a task that the strategy needs, or has one it cannot use.
        ConfigError: If the strategy is unknown.
    """
    strategy = canonical_strategy(strategy)
    if cluster.task is not None and cluster.task.type == EVALUATOR:
        raise ClusterError(
            f"this process is {cluster.task}, which takes no part in training, and would train by itself: the chief "
            "evaluates after each epoch, and --mode=eval a run's model; start no evaluator"
        )
    got = ", ".join(f"{len(hosts)} {role}" for role, hosts in cluster.addresses.items()) or "no tasks"
    if strategy == "ps":
        for role in ROLES:
            if role not in cluster.addresses:
                raise ClusterError(
                    f"strategy 'ps' needs a {role} task, and the cluster has {got}: add one to the cluster "
                    "(python -m tfdist.launch --strategy=ps starts a whole local cluster)"
                )
    elif cluster.num_ps:
        raise ClusterError(
            f"strategy {strategy!r} has no use for ps tasks, and the cluster has {got}: "
            "choose --strategy=ps, or take the ps tasks out"
        )
    elif strategy in ("one_device", "mirrored") and not cluster.is_single:
        raise ClusterError(
            f"strategy {strategy!r} runs in one process, and the cluster has {got}: "
            "choose --strategy=multiworker or --strategy=ps, or start one process"
        )


def join_address(host: str, port: int) -> str:
    """Makes `host:port`, an IPv6 host in brackets; `split_address` undoes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Splits `host:port`.

    Args:
        address: As in TF_CONFIG; an IPv6 host stands in brackets.

    Returns:
        The host (without brackets) and the port.

    Raises:
        ClusterError: If the host or port is missing or malformed.
    """
    host, colon, port = address.rpartition(":")
    if not colon or port.endswith("]"):
        raise ClusterError(f"address {address!r} has no port: write host:port, as in {address}:2222")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ClusterError(
            f"port {port!r} of address {address!r}: a port is a number from 1 to 65535; correct it"
        )
    if not _HOST.fullmatch(host):
        raise ClusterError(
            f"host {host!r} of address {address!r} is not a host name or IP address: write host:port, "
            "without a scheme or blanks, an IPv6 address in brackets"
        )
    return host.strip("[]"), int(port)


def _check_addresses(addresses: Mapping[str, tuple[str, ...]]) -> None:
    owners: dict[str, Task] = {}
    for role, hosts in addresses.items():
        for index, address in enumerate(hosts):
            split_address(address)
            task = Task(role, index)
            if address in owners:
                raise ClusterError(
                    f"address {address!r} is given to both {owners[address]} and {task}: "
                    "each task needs its own; change one port"
                )
            owners[address] = task
    if len(addresses.get("chief", ())) > 1:
        raise ClusterError(
            f"{len(addresses['chief'])} chief tasks: a cluster has one chief; make the others workers"
        )


def _missing_task_message(addresses: Mapping[str, tuple[str, ...]], task: Task) -> str:
    known = len(addresses.get(task.type, ()))
    if not known:
        got = ", ".join(addresses) or "no tasks"
        return (
            f"task {task} is not in the cluster, which has {got}: "
            f"add {task.type!r} to the cluster or correct the type"
        )
    return (
        f"index {task.index} of task {task} is out of range: the cluster has {known} {task.type} "
        f"address{'es' if known > 1 else ''}, so the index is at most {known - 1}; correct it or add an address"
    )


def _unknown_role_message(role: object) -> str:
    nearest = find_nearest(str(role).lower(), (*ROLES, EVALUATOR))
    hint = f"; did you mean {nearest!r}?" if nearest and nearest != role else ""
    where = " inside the cluster (it hangs ps training: leave it out)" if role == EVALUATOR else ""
    return f"unknown role {role!r}{where}{hint} (one of: {', '.join(ROLES)})"


def _parse_addresses(cluster: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(cluster, dict):
        raise ClusterError(
            f"'cluster' of TF_CONFIG is {_shorten(cluster)!r}, not an object: "
            'write {"worker": ["host:port", ...], ...}'
        )
    addresses: dict[str, tuple[str, ...]] = {}
    for role, hosts in cluster.items():
        if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
            raise ClusterError(
                f"addresses of {role!r} in TF_CONFIG are {_shorten(hosts)!r}, not a list of strings: "
                'write ["host:port", ...]'
            )
        if role == EVALUATOR:
            _logger.warning(
                "TF_CONFIG: left the evaluator out of the cluster, where it would hang ps training"
            )
            continue
        role = _canonical_role(role)
        if role in addresses:
            raise ClusterError("TF_CONFIG has both 'chief' and 'master', two names of one role: keep 'chief'")
        addresses[role] = tuple(hosts)
    return addresses


def _parse_task(task: Any, addresses: Mapping[str, tuple[str, ...]]) -> Task:
    example = f'"task": {{"type": "{next(iter(addresses))}", "index": 0}}'
    if task is None:
        raise ClusterError(
            f"TF_CONFIG has a 'cluster' but no 'task', which says who this process is: add {example}"
        )
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        raise ClusterError(
            f"'task' of TF_CONFIG is {_shorten(task)!r}, without type and index: write {example}"
        )
    index = task["index"]
    if isinstance(index, str) and index.isascii() and index.isdigit():  # TensorFlow takes "0" for 0
        index = int(index)
    return Task(_canonical_role(task["type"]), index)


def _canonical_role(role: Any) -> Any:
    if role == "master":
        _logger.warning("TF_CONFIG: 'master' is the old name of the chief; taken for 'chief'")
        return "chief"
    return role


def _shorten(value: object) -> object:
    if isinstance(value, (int, float, bool)) or value is None:
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
