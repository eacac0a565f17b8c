"""Writes flags.md: every flag of `tfdist.train`, from the code.

python docs/list_flags.py [--check]
"""

import sys

from made import ROOT, keep  # first: it puts this checkout on the path

from tfdist.commands.flags import define_flags

PAGE = ROOT / "docs" / "flags.md"


def render() -> str:
    """Returns the page."""
    values = define_flags()
    lines = [
        "# Flags",
        "",
        "Of `python -m tfdist.train`; `-` and `_` are the same in their names. This page is made from the code, by",
        "`python docs/list_flags.py`.",
        "",
        "| flag | default | |",
        "|---|---|---|",
    ]
    for name in sorted(values):
        flag = values[name]
        if flag.name != name:
            continue  # a short name
        choices = getattr(flag.parser, "enum_values", None)
        words = " ".join(flag.help.split())
        help_text = words.partition(">: ")[2] if words.startswith("<") else words
        text = help_text + (f" One of {', '.join(map(str, choices))}." if choices else "")
        default = "" if flag.default in (None, "", []) else f"`{flag.default}`"
        lines.append(f"| `--{name}` | {default} | {text.replace('|', ' or ')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(keep(PAGE, render()))
