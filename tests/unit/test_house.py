"""The rules of the house, read from the source with `ast`. CONTRIBUTING.md says them in words."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = {
    "errors": 0,
    "cluster": 0,
    "guests": 0,
    "gpus": 0,
    "ports": 0,
    "heartbeat": 0,
    "memory": 0,
    "members": 0,
    "sync_options": 0,
    "config": 0,
    "environments": 0,
    "launcher": 1,
    "strategies": 1,
    "keras_internals": 1,
    "data": 1,
    "devices": 1,
    "door": 1,
    "exchange": 1,
    "layers": 1,
    "optimizers": 1,
    "recipe": 1,
    "training": 2,
    "checkup": 2,
    "server": 2,
    "runtime": 3,
    "flags": 3,
    "execute": 4,
    "train": 4,
    "launch": 4,
    "doctor": 4,
    "plan": 4,
    "report": 4,
    "__init__": 4,
}
# Rooms of one floor do not know each other, except these.
NEIGHBOURS = {
    "cluster": {"errors"},
    "guests": {"errors", "cluster"},
    "ports": {"errors", "cluster", "guests"},
    "gpus": {"errors", "cluster", "environments"},
    "members": {"errors", "cluster"},
    "sync_options": {"errors"},
    "config": {"errors", "cluster", "sync_options"},
    "environments": {"errors", "cluster", "ports"},
    "recipe": {"data"},
    "layers": {"keras_internals", "optimizers"},
    "optimizers": {"keras_internals"},
    "strategies": {"keras_internals", "devices"},
    "exchange": {"devices"},
}
NO_TENSORFLOW = {
    "errors",
    "cluster",
    "guests",
    "ports",
    "heartbeat",
    "memory",
    "members",
    "sync_options",
    "config",
    "environments",
    "launcher",
    "checkup",
}
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
PRIVATE_PREFIXES = ("tensorflow.python", "tf.python", "keras.src", "tf_keras.src")


@dataclass(frozen=True)
class Import:
    module: str  # dotted, of what is imported
    line: int
    in_function: bool
    for_types_only: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`tfdist.data.order` -> `data`; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[Import]:
    """Yields every import in the tree; `from tfdist.a import b` is `tfdist.a.b`, which may be a name in tfdist.a."""
    package = module.split(".") if is_package else module.split(".")[:-1]

    def visit(node: ast.AST, in_function: bool, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, in_function, types_only)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield Import(".".join([*base, alias.name]), node.lineno, in_function, types_only)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        types_only = types_only or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function, types_only)

    return visit(tree, False, False)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def file_imports(path: Path) -> list[Import]:
    return list(imports(ast.parse(path.read_text()), module_name(path), path.name == "__init__.py"))


def wrong_direction(importer: str, imported: str) -> str | None:
    """What is wrong with `importer` (a module of tfdist or a recipe) importing `imported`, or None."""
    if imported.split(".")[0] == "recipes":
        return None if importer.startswith("recipes") else "tfdist does not know the recipes"
    source, target = room(importer), room(imported)
    if importer.startswith("tfdist") and source not in FLOORS:  # another test's complaint
        return None
    if target not in FLOORS:  # `from tfdist import Recipe`: a name that the package hands on
        target = "__init__"
    if importer.startswith("recipes"):
        return None if target == "__init__" or FLOORS[target] <= 1 else "a recipe knows floors 0 and 1 only"
    if source == target or source == "__init__":
        return None
    if FLOORS[source] == FLOORS[target] == 4:
        return None if target != "__init__" else "inside, import the module itself, not the package"
    if FLOORS[target] > FLOORS[source]:
        return f"{target} (floor {FLOORS[target]}) is above {source} (floor {FLOORS[source]})"
    if FLOORS[target] == FLOORS[source] and target not in NEIGHBOURS.get(source, ()):
        return f"{target} is another room on {source}'s floor"
    return None


def test_every_module_has_a_floor():
    strangers = {room(module_name(path)) for path in sources("tfdist")} - set(FLOORS)
    assert not strangers, f"give {sorted(strangers)} a floor in FLOORS"


def test_imports_go_down_or_sideways():
    wrong = [
        f"{path.relative_to(ROOT)}:{item.line}: imports {item.module}: {complaint}"
        for path in sources("tfdist", "recipes")
        for item in file_imports(path)
        if item.module.split(".")[0] in ("tfdist", "recipes")
        and (complaint := wrong_direction(module_name(path), item.module))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("tfdist.launcher.local", "tfdist.cluster.Cluster", True),
        ("tfdist.launcher.local", "tfdist.launcher.job", True),
        ("tfdist.launcher.local", "tfdist.strategies", False),
        ("tfdist.config", "tfdist.runtime", False),
        ("tfdist.data.order", "tfdist.Recipe", False),
        ("tfdist.train", "tfdist.launch", True),
        ("tfdist.runtime", "recipes.digits_cnn", False),
        ("recipes.digits_cnn", "tfdist.training.step", False),
        ("recipes.digits_cnn", "tfdist.Recipe", True),
    ],
)
def test_wrong_direction_knows_the_floors(importer, imported, allowed):
    assert (wrong_direction(importer, imported) is None) == allowed


def test_imports_have_no_cycle():
    graph: dict[str, set[str]] = {}
    modules = {module_name(path): path for path in sources("tfdist")}
    for module, path in modules.items():
        targets = graph.setdefault(module, set())
        for item in file_imports(path):
            name = item.module if item.module in modules else item.module.rpartition(".")[0]
            # A package's __init__ runs before its modules whatever they import: only its own imports count.
            if name in modules and name != "tfdist" and name != module and not item.for_types_only:
                targets.add(name)
    graph.pop("tfdist", None)  # It hands names on lazily.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


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
    for item in imports(tree, module_name(path), path.name == "__init__.py"):
        yield item.line, item.module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def test_private_keras_and_tensorflow_names_stay_in_one_file():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("tfdist", "recipes")
        if path.name != "keras_internals.py"
        for line, name in private_names(path)
        if f"{name}.".startswith(tuple(f"{prefix}." for prefix in PRIVATE_PREFIXES))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_lower_rooms_do_not_name_tensorflow():
    heavy = {"tensorflow", "keras", "tensorflow_datasets", "numpy"}
    wrong = [
        f"{path.relative_to(ROOT)}:{item.line}: imports {item.module}"
        for path in sources("tfdist")
        if room(module_name(path)) in NO_TENSORFLOW
        for item in file_imports(path)
        if item.module.split(".")[0] in heavy and not item.for_types_only
    ]
    assert not wrong, "\n".join(wrong)


def test_starting_loads_no_tensorflow():
    code = (
        "import sys, tfdist, tfdist.launch, tfdist.doctor;"
        "print(*sorted({'tensorflow', 'keras', 'numpy', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"loaded at start: {done.stdout}"
