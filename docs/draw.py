"""Draws the rooms of `tfdist/` and who imports whom into architecture.md, from the code.

python docs/draw.py [--check]
"""

import ast
import sys

import grimp
from made import ROOT, keep

PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- drawn by docs/draw.py -->\n", "<!-- end of drawing -->\n"


def describe(module: str) -> str:
    """Returns the first line of a module's docstring."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def find_arrows(package: str) -> dict[str, set[str]]:
    """Returns for each room of a package those that it imports and no room between them does: the rest follows."""
    graph = grimp.build_graph("tfdist", exclude_type_checking_imports=True, cache_dir=None)
    rooms = graph.find_children(package)
    knows = {
        room: {
            other
            for other in rooms - {room}
            if graph.direct_import_exists(importer=room, imported=other, as_packages=True)
        }
        for room in rooms
    }

    def reach(room: str) -> set[str]:
        return knows[room].union(*(reach(other) for other in knows[room]))

    return {room: near - set().union(*(reach(other) for other in near)) for room, near in knows.items()}


def draw(package: str) -> str:
    """Returns a table of a package's rooms, the upper ones first, and a picture in Mermaid's language."""
    arrows = find_arrows(package)
    lines = ["```mermaid", "flowchart TD"]
    for room, near in sorted(arrows.items()):
        lines += [f"    {room.rpartition('.')[2]} --> {other.rpartition('.')[2]}" for other in sorted(near)]
    lines += ["```", "", "| | |", "|---|---|"]
    lines += [f"| `{room.rpartition('.')[2]}` | {describe(room)} |" for room in sorted(arrows)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the drawing, or tells whether the page has it."""
    old = PAGE.read_text(encoding="utf-8")
    parts = old.split(BEGIN)
    new = parts[0]
    for package, part in zip(("tfdist", "tfdist.training", "tfdist.launcher"), parts[1:], strict=True):
        new += f"{BEGIN}\n{draw(package)}\n{END}{part.partition(END)[2]}"
    return keep(PAGE, new)


if __name__ == "__main__":
    sys.exit(main())
