"""Where a run takes place, for whoever reads of it later."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow as tf

import tfdist
from tfdist.cluster.cores import count_cores
from tfdist.cluster.spec import Cluster
from tfdist.recipe import Recipe

_PACKAGES = ("tensorflow", "keras", "numpy")


def describe_environment(cluster: Cluster, recipe: Recipe) -> dict[str, Any]:
    """Returns values that JSON can hold; none of them is a secret.

    Args:
        cluster: The run's.
        recipe: Whose batch size and epochs are its defaults.
    """
    gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    return {
        "begun": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "tfdist.train", *sys.argv[1:]]),
        "host": socket.gethostname(),
        "hosts": cluster.hosts,
        "tasks": {role: len(addresses) for role, addresses in cluster.addresses.items()},
        "cores": count_cores(),
        "processor": _read_processor(),
        "gpus": [str(gpu.get("device_name", "GPU")) for gpu in gpus],
        "python": platform.python_version(),
        "packages": {"tfdist": tfdist.__version__} | {name: version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "folder": os.getcwd(),
        "recipe_defaults": {"global_batch_size": recipe.global_batch_size, "epochs": recipe.epochs},
    }


def _read_processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
