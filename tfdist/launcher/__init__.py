"""Starts and supervises the processes of a cluster; loads no TensorFlow."""

from tfdist.launcher.job import (
    ONEDNN,
    Job,
    build_cluster,
    build_python_command,
    parse_num_workers,
    render_dry_run,
    render_env,
)
from tfdist.launcher.local import render_dry_run_local, run_local

__all__ = [
    "ONEDNN",
    "Job",
    "build_cluster",
    "build_python_command",
    "parse_num_workers",
    "render_dry_run",
    "render_dry_run_local",
    "render_env",
    "run_local",
]
