"""Jobs that Kubernetes starts."""
