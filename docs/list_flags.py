"""Writes flags.md: every flag of `tfdist.train`, from the code.

python docs/list_flags.py [--check]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "flags.md"


def render() -> str:
    """Returns the page."""
    sys.path.insert(0, str(ROOT))  # this checkout, not one that is installed
    from tfdist.commands.flags import define_flags

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


def main() -> int:
    """Writes the page, or tells whether it is there."""
    text = render()
    if "--check" in sys.argv[1:]:
        is_current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        if not is_current:
            print("docs/flags.md is not what the code is: python docs/list_flags.py")
        return int(not is_current)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
