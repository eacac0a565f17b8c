"""What one task sees of its machine: `python -m tfdist.diagnostics.facts` prints it as a line of JSON on each task."""

import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfdist.cluster.cores import count_cores
from tfdist.cluster.environments import detect_cluster
from tfdist.cluster.environments.slurm import describe_unused
from tfdist.cluster.environments.tf_config import VARIABLE
from tfdist.cluster.gpus import VISIBLE_VARIABLE, deal_gpus, list_gpus
from tfdist.cluster.peer_allowlist import is_open
from tfdist.cluster.spec import Cluster
from tfdist.diagnostics.rendezvous import Rendezvous, nearest_folder
from tfdist.errors import ConfigError, TfdistError
from tfdist.launcher.process.memory import read_available_bytes
from tfdist.recipe import RECIPES_DIR, check_recipe_exists

_PACKAGES = ("tensorflow", "keras", "numpy", "protobuf")
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXIES = ("no_grpc_proxy", "no_proxy")
_THREADS = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactsRequest:
    """What the doctor was told on its command line.

    Attributes:
        run_dir: Folder that the run will have, or None.
        recipe: As for `tfdist.train`, or None.
        data_files: Pattern of the training files, or None.
        wait_secs: How long the tasks wait for each other.
        strategy: By which a scheduler's tasks get their roles, or None.
        num_ps: Of them, or None.
    """

    run_dir: str | None = None
    recipe: str | None = None
    data_files: str | None = None
    wait_secs: float = 10.0
    strategy: str | None = None
    num_ps: int | None = None


def gather_facts(env: Mapping[str, str], asked: FactsRequest) -> dict[str, Any]:
    """Looks at this machine, and meets the other tasks; JSON can hold what is found, and none of it is a secret."""
    cluster, error = _detect(env, asked)
    facts: dict[str, Any] = {
        "task": str(cluster.task) if cluster.task else None,
        "host": socket.gethostname(),
        "tf_config": env.get(VARIABLE),
        "cluster": {role: list(addresses) for role, addresses in cluster.addresses.items()},
        "cluster_error": error,
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": {name: _version(name) for name in _PACKAGES},
        "tfdist": _digest(*sorted(Path(__file__).parents[1].rglob("*.py"))),
        **(_look_at_recipe(asked.recipe) if asked.recipe else {"recipe": None, "recipe_error": None}),
        "num_cores": count_cores(),
        "threads": max((int(env[n]) for n in _THREADS if env.get(n, "").isdecimal()), default=None),
        "gpus": _find_gpus(env, cluster),
        "memory_bytes": read_available_bytes(),
        "num_files": len(glob.glob(asked.data_files, recursive=True)) if asked.data_files else None,
        "proxies": [name for name in _PROXIES if env.get(name)],
        "proxied_hosts": find_proxied(env, cluster),
        "unused": describe_unused(env),
        "is_open": _is_open(cluster, env),
        **_look_at_disk(asked.run_dir),
    }
    with Rendezvous(cluster, facts, run_dir=asked.run_dir, wait_secs=asked.wait_secs) as meeting:
        return facts | meeting.run()


def find_proxied(env: Mapping[str, str], cluster: Cluster) -> list[str]:
    """Says for which hosts of the cluster gRPC would ask a proxy."""
    if not any(env.get(name) for name in _PROXIES):
        return []
    # gRPC reads the first of these that is set.
    spared = next((env[name] for name in _NO_PROXIES if env.get(name)), "")
    endings = [word.strip().lstrip(".") for word in spared.split(",") if word.strip()]
    return sorted(host for host in cluster.hosts if not any(host.endswith(ending) for ending in endings))


def main() -> int:
    """Prints the facts of this task."""
    facts = gather_facts(os.environ, FactsRequest(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")))
    for peer in facts["peers"].values():
        peer.pop("facts", None)  # it tells its own
    # One write, so that no other line comes into it.
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    return 0


def _detect(env: Mapping[str, str], asked: FactsRequest) -> tuple[Cluster, str | None]:
    try:
        return detect_cluster(env, strategy=asked.strategy, num_ps=asked.num_ps) or Cluster(), None
    except ConfigError as error:
        return Cluster(), str(error)


def _is_open(cluster: Cluster, env: Mapping[str, str]) -> bool:
    try:
        return is_open(cluster, env)
    except ConfigError:  # which the meeting meets too, and tells
        return False


def _version(name: str) -> str | None:
    """Returns the version of an installed package, not importing it; some come in more than one distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        others = importlib.metadata.packages_distributions().get(name)
        return importlib.metadata.version(others[0]) if others else None


def _digest(*paths: Path) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _look_at_recipe(name: str) -> dict[str, str | None]:
    """Returns the digest of a recipe's file, or why there is none; importing it would load TensorFlow."""
    try:
        check_recipe_exists(name)
        return {"recipe": _digest(_find_recipe(name)), "recipe_error": None}
    except (ConfigError, OSError) as error:
        return {"recipe": None, "recipe_error": str(error)}


def _find_recipe(name: str) -> Path:
    if os.sep in name or name.endswith(".py"):
        return Path(name).expanduser()
    if "." not in name:
        return RECIPES_DIR / f"{name}.py"
    places = [Path(folder or ".") / name.replace(".", os.sep) for folder in sys.path]
    files = [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")]
    found = [path for path in files if path.is_file()]
    if not found:
        raise ConfigError(f"no module {name!r} can be found: copy it there, or correct PYTHONPATH")
    return found[0]


def _find_gpus(env: Mapping[str, str], cluster: Cluster) -> list[str]:
    """Returns the GPUs that this task will compute on; none where there is no driver, whatever a variable names."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        own = deal_gpus(env, cluster, "ps" if cluster.num_ps else "multiworker")
    except TfdistError:
        return []  # the run itself says why
    return list_gpus(env if own.visible is None else {**env, VISIBLE_VARIABLE: own.visible})


def _look_at_disk(run_dir: str | None) -> dict[str, Any]:
    place = nearest_folder(run_dir or tempfile.gettempdir())
    return {"disk": str(place), "disk_bytes": shutil.disk_usage(place).free}


if __name__ == "__main__":
    sys.exit(main())
