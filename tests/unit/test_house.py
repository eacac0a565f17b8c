"""The rules of the house that no linter knows, read from the source with `ast`; import-linter holds who knows whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
PRIVATE_PREFIXES = ("tensorflow.python", "tf.python", "keras.src", "tf_keras.src")


@dataclass(frozen=True)
class Import:
    module: str  # dotted, of what is imported
    line: int
    in_function: bool


def imports(tree: ast.AST) -> Iterator[Import]:
    """Yields every import in the tree; `from tfdist.a import b` is `tfdist.a.b`, which may be a name in tfdist.a."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, in_function)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, in_function)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    return visit(tree, False)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def file_imports(path: Path) -> list[Import]:
    return list(imports(ast.parse(path.read_text())))


def uncommented(items: list[Import], lines: list[str]) -> Iterator[Import]:
    """Yields the imports inside functions with no comment on their line, nor above the block they stand in."""
    inside = {item.line for item in items if item.in_function}
    for item in items:
        above = item.line - 1
        while above in inside:
            above -= 1
        said = "  # " in lines[item.line - 1] or lines[above - 1].strip().startswith("#")
        if item.in_function and not said:
            yield item


def test_imports_inside_functions_say_why():
    wrong = [
        f"{path.relative_to(ROOT)}:{item.line}: import {item.module} without a comment"
        for path in sources("tfdist", "recipes")
        for item in uncommented(file_imports(path), path.read_text().splitlines())
    ]
    assert not wrong, "\n".join(wrong)


def test_module_names_are_nouns_of_their_own():
    vague = [
        str(p.relative_to(ROOT))
        for p in sources("tfdist", "recipes")
        if VAGUE_NAMES & set(p.with_suffix("").parts)
    ]
    assert not vague, f"say what these are about: {vague}"


def test_every_package_folder_has_an_init():
    # setuptools leaves a folder without one out of the wheel.
    bare = {p.parent for p in sources("tfdist", "recipes") if not (p.parent / "__init__.py").exists()}
    assert not bare, f"no __init__.py in {sorted(map(str, bare))}"


def private_names(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text())
    for item in imports(tree):
        yield item.line, item.module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def test_private_keras_and_tensorflow_names_stay_in_one_folder():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("tfdist", "recipes")
        if "keras_internals" not in path.parts
        for line, name in private_names(path)
        if f"{name}.".startswith(tuple(f"{prefix}." for prefix in PRIVATE_PREFIXES))
    ]
    assert not wrong, "\n".join(wrong)


MOST_ATTRIBUTES, MOST_LINES_OF_CLASS, MOST_LINES_OF_FUNCTION = 12, 300, 60


def code_lines(node: ast.AST) -> int:
    """Returns how many lines a class or a function has, without docstrings."""
    count = node.end_lineno - node.lineno + 1
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None:
            count -= inner.body[0].end_lineno - inner.body[0].lineno + 1
    return count


def attributes(node: ast.ClassDef) -> set[str]:
    """Returns the names of what objects of a class hold."""
    fields = {
        f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
    }
    stored = {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Store)
        and isinstance(inner.value, ast.Name)
        and inner.value.id == "self"
    }
    return fields | stored


def too_large(path: Path) -> Iterator[str]:
    """Yields the classes and functions over the limits above which no comment says why: `# Wide: …`, `# Long: …`."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        is_wide = is_long = False
        if isinstance(node, ast.ClassDef):
            is_wide = len(attributes(node)) > MOST_ATTRIBUTES
            is_long = code_lines(node) > MOST_LINES_OF_CLASS
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_long = code_lines(node) > MOST_LINES_OF_FUNCTION
        if not (is_wide or is_long):
            continue
        above = lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 2].strip()
        if not above.startswith("# Wide: " if is_wide else "# Long: "):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"


def test_what_is_long_or_wide_says_why():
    wrong = [found for path in sources("tfdist", "recipes") for found in too_large(path)]
    assert not wrong, (
        f"more than {MOST_LINES_OF_FUNCTION} lines of a function, {MOST_LINES_OF_CLASS} lines or "
        f"{MOST_ATTRIBUTES} attributes of a class, without docstrings:\n" + "\n".join(wrong)
    )


def test_starting_loads_no_tensorflow():
    code = (
        "import sys, tfdist, tfdist.launch, tfdist.doctor;"
        "print(*sorted({'tensorflow', 'keras', 'numpy', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"loaded at start: {done.stdout}"
