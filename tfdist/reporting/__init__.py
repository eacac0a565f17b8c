"""Tells of runs on a page: what they were, how they went, and how they ended; loads no TensorFlow."""

import os
from collections.abc import Mapping

# "off" where nobody reads what every run would write.
VARIABLE = "TFDIST_REPORT"


def is_wanted(report: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Says whether a run is to end with a report.

    Args:
        report: `on` or `off`, of its settings.
        environ: Where `TFDIST_REPORT=off` says no for all.
    """
    return report == "on" and environ.get(VARIABLE) != "off"
