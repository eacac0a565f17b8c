"""Jobs that Slurm starts."""
