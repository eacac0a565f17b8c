"""Draws what the first command of the docs shows into terminal.svg.

python docs/terminal.py
"""

import re
import subprocess
import sys
import tempfile

from made import ROOT
from rich.console import Console
from rich.text import Text

COMMAND = "python -m tfdist.train --strategy=ps"
# Of what the libraries write beside it.
_NOISE = re.compile(r"WARNING: All log messages|^\S+ [IWE]\d{4} |^[IWE]\d{4} ")


def main() -> int:
    """Runs the command, and draws its lines."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *COMMAND.split()[1:]]
        done = subprocess.run(
            words,
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    lines = [line for line in done.stdout.splitlines() if not _NOISE.search(line)]
    # Whole epochs alone, and of these the first and the last.
    lines = [line for line in lines if " epoch " not in line or "val_loss" in line]
    lines = [*lines[:4], "…", *lines[-4:]]
    with open("/dev/null", "w") as nowhere:
        console = Console(record=True, width=164, file=nowhere)
        console.print(Text(f"$ {COMMAND}", style="bold"))
        for line in lines:
            console.print(Text(line), soft_wrap=False)
        svg = console.export_svg(title="tfdist", unique_id="tfdist")
    # No font from elsewhere: the reader's own.
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    (ROOT / "docs" / "terminal.svg").write_text(svg, encoding="utf-8")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
