"""Pages that are made from the code: written, or checked to be what the code is."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, not one that is installed


def keep(page: Path, text: str) -> int:
    """Writes a page, or with `--check` says whether it is there; returns an exit code."""
    if "--check" not in sys.argv[1:]:
        page.write_text(text, encoding="utf-8")
        return 0
    is_current = page.exists() and page.read_text(encoding="utf-8") == text
    if not is_current:
        print(f"{page.relative_to(ROOT)} is not what the code is: python {sys.argv[0]}")
    return int(not is_current)
