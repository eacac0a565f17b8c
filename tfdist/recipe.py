"""A recipe is a plain module that says how to build one model and its data: found by name, dotted module or path."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import difflib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import types
import typing
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tfdist.errors import ConfigError

# Beside the package, both in a checkout and in an installed wheel. Read by path, never through `import recipes`: a
# user's own folder of that name comes first on sys.path and would hide the recipes that tfdist brings.
RECIPES_DIR = Path(__file__).parent.parent / "recipes"

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `tfdist.train` needs to know about a model and its data.

    ```python
    RECIPE = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=64, epochs=5)
    ```

    Attributes:
        build_model: Called with keyword arguments alone, inside the strategy's scope; gives a compiled `keras.Model`.
            Every parameter needs a default and a name to give it by; `--set` overrides them.
        build_data: Called with a split, "train" or "test", and keyword arguments; gives the examples of that split in
            any form that `fit` takes. Every parameter but the first needs a default and a name to give it by.
        global_batch_size: Examples per optimizer step over all replicas.
        epochs: Passes over the training examples.

    Raises:
        ConfigError: If a builder cannot be called that way, or a number is not a whole number of at least 1.

    Examples:
        >>> import keras, numpy, tfdist
        >>> def build_model(*, width: int = 8) -> keras.Model:
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(width), keras.layers.Dense(1)])
        ...     model.compile("sgd", "mse")
        ...     return model
        >>> def build_data(split: str, *, num_examples: int = 100):
        ...     x = numpy.ones((num_examples, 4))
        ...     return x, x[:, :1]
        >>> recipe = tfdist.Recipe(build_model=build_model, build_data=build_data, global_batch_size=20, epochs=2)
        >>> recipe.epochs
        2
    """

    build_model: Callable[..., Any]
    build_data: Callable[..., Any]
    global_batch_size: int
    epochs: int

    def __post_init__(self) -> None:
        """Checks the fields.

        Raises:
            ConfigError: If one of them breaks its rule.
        """
        for field in ("build_model", "build_data"):
            builder = getattr(self, field)
            if not callable(builder):
                raise ConfigError(
                    f"Recipe({field}={builder!r}): it must be a function; pass it without calling it."
                )
            try:
                inspect.signature(builder)
            except ValueError:
                raise ConfigError(
                    f"Recipe({field}={builder!r}): Python does not know its parameters; pass a function that calls it."
                ) from None
            if field == "build_data" and not _takes_positional(builder):
                raise ConfigError(
                    'Recipe(build_data=…): it must take the split, "train" or "test", first, by position.'
                )
            for parameter in _overridable(builder, skip_first=field == "build_data").values():
                if parameter.kind is parameter.POSITIONAL_ONLY:
                    raise ConfigError(
                        f"Recipe({field}=…): its parameter {parameter.name!r} cannot be given by name; move the '/' "
                        "in front of it or leave it out."
                    )
                if parameter.default is parameter.empty:
                    raise ConfigError(
                        f"Recipe({field}=…): its parameter {parameter.name!r} has no default; give it one, so that "
                        "the recipe runs without flags."
                    )
        for field in ("global_batch_size", "epochs"):
            number = getattr(self, field)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"Recipe({field}={number!r}): it must be a whole number of at least 1.")


def list_recipes() -> list[tuple[str, str]]:
    """Lists the recipes that come with tfdist, without importing (and so without TensorFlow).

    Returns:
        Name and first docstring line of each, sorted by name.
    """
    names = []
    for path in sorted(RECIPES_DIR.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        names.append((path.stem, docstring.partition("\n")[0]))
    return names


def resolve_recipe_name(name: str) -> str:
    """Makes a recipe's name mean the same from every folder, so that a run can be picked up again from its config.

    Args:
        name: As for `load_recipe`.

    Returns:
        A file's absolute path; any other name as it is.
    """
    return str(Path(name).expanduser().absolute()) if _is_path(name) else name


def check_recipe_exists(name: str) -> None:
    """Checks what can be checked without importing the recipe, and so without TensorFlow.

    Args:
        name: As for `load_recipe`; a dotted module is not looked at.

    Raises:
        ConfigError: If there is no such recipe, or its file defines no RECIPE.
    """
    if _is_path(name):
        path = _existing_file(name)
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return  # The import will show where.
        if not any(_may_define(node) for node in ast.walk(tree)):
            raise ConfigError(_no_recipe_message(name, "has no RECIPE"))
    elif "." not in name:
        _shipped_stem(name)


def load_recipe(name: str) -> Recipe:
    """Finds a recipe's module, imports it and hands out its `RECIPE`.

    An error that the module itself raises is passed on with its traceback: it is the recipe author's to see.

    Args:
        name: One of `list_recipes` ("digits_cnn"), a dotted module ("mypkg.my_recipe"), or the path of a Python file
            ("./my_recipe.py"), whose folder is then searched last for modules that it imports; `from .neighbour import`
            finds a file beside it first.

    Returns:
        The recipe.

    Raises:
        ConfigError: If there is no such recipe, or the module has no `RECIPE`.
    """
    if _is_path(name):
        module = _import_path(name)
    elif "." in name:
        module = _import_dotted(name)
    else:
        module = _import_shipped(name)
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        found = "has no RECIPE" if recipe is None else f"has a RECIPE of type {type(recipe).__name__}"
        raise ConfigError(_no_recipe_message(name, found))
    return recipe


def parse_overrides(
    recipe: Recipe, overrides: Iterable[str], *, data_dir: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turns `--set name=value` flags into keyword arguments, typed by the builders' annotations.

    Args:
        recipe: Whose builders take the arguments. A name that both builders have goes to both.
        overrides: Such as `["filters=64", "widths=128,64"]`; of a name given twice the last counts. "none" stands for
            None where the annotation allows it, commas separate the items of a tuple or list.
        data_dir: Goes to a `build_data` that has a parameter of that name.

    Returns:
        Keyword arguments for `build_model` and for `build_data`.

    Raises:
        ConfigError: If a name is unknown or a value does not fit its annotation.
    """
    builders = (
        (recipe.build_model, _overridable(recipe.build_model, skip_first=False)),
        (recipe.build_data, _overridable(recipe.build_data, skip_first=True)),
    )
    keywords: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    if data_dir is not None and "data_dir" in builders[1][1]:
        keywords[1]["data_dir"] = data_dir
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(
                f"--set {override!r}: write it as name=value, for example --set learning_rate=0.01"
            )
        if not any(name in parameters for _, parameters in builders):
            known = {n: p.default for _, parameters in reversed(builders) for n, p in parameters.items()}
            listed = ", ".join(f"{n}={default!r}" for n, default in sorted(known.items())) or "none at all"
            raise ConfigError(
                f"--set {override}: the recipe has no {name!r}.{_nearest(name, known)} Its settings and their "
                f"defaults: {listed}."
            )
        for (builder, parameters), kwargs in zip(builders, keywords, strict=True):
            if name in parameters:
                annotation = _annotation(builder, parameters[name])
                kwargs[name] = _parse_value(text.strip(), annotation, where=f"--set {override}")
    return keywords


def _is_path(name: str) -> bool:
    return name.endswith(".py") or "/" in name or "\\" in name


def _may_define(node: ast.AST) -> bool:
    """Whether a statement may bring a RECIPE: an assignment, or an import of it or of everything."""
    if isinstance(node, ast.alias):
        return node.asname == "RECIPE" or node.name in ("RECIPE", "*")
    return isinstance(node, ast.Name) and node.id == "RECIPE"


def _no_recipe_message(name: str, found: str) -> str:
    return (
        f"The recipe {name!r} {found}; end the module with: RECIPE = tfdist.Recipe(build_model=build_model, "
        "build_data=build_data, global_batch_size=64, epochs=5)"
    )


def _shipped_stem(name: str) -> str:
    known = [known for known, _ in list_recipes()]
    stem = name.replace("-", "_")
    if stem not in known:
        own_file = f" For the file here write --recipe=./{name}.py." if Path(f"{name}.py").is_file() else ""
        raise ConfigError(
            f"There is no recipe {name!r}.{_nearest(stem, known)}{own_file} Choose one of {', '.join(known)}, a dotted "
            "module (mypkg.my_recipe) or a file (./my_recipe.py)."
        )
    return stem


def _import_shipped(name: str) -> types.ModuleType:
    stem = _shipped_stem(name)
    return _import_file(RECIPES_DIR / f"{stem}.py", package="tfdist_recipes")


def _import_dotted(name: str) -> types.ModuleType:
    if name.startswith("."):
        raise ConfigError(
            f"The recipe {name!r} starts with a dot, but there is no package to start from; write the whole module "
            "(mypkg.my_recipe) or a file (./my_recipe.py)."
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's bug and keeps its traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"There is no module {error.name!r}, wanted for the recipe {name!r}; run from the folder that holds it, "
            "put that folder on PYTHONPATH, or give the file's path (./my_recipe.py)."
        ) from None


def _existing_file(name: str) -> Path:
    path = Path(resolve_recipe_name(name))
    if not path.is_file():
        raise ConfigError(
            f"There is no recipe file {str(path)!r}; give the path of a Python file with a RECIPE."
        )
    return path


def _import_path(name: str) -> types.ModuleType:
    path = _existing_file(name)
    # Last, so that a file beside the recipe never hides an installed module; it stays, for imports made later on.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return _import_file(path, package=f"tfdist_recipes_{zlib.crc32(os.fsencode(path.parent)):08x}")


def _import_file(path: Path, *, package: str) -> types.ModuleType:
    """Imports a file as one of a package that its folder makes, so that it may say `from .neighbour import …`."""
    folder = types.ModuleType(package)
    folder.__path__ = [str(path.parent)]
    sys.modules.setdefault(package, folder)
    module_name = f"{package}.{path.stem.replace('.', '_')}"
    # Named outright, so that a recipe file need not end in ".py".
    loader = importlib.machinery.SourceFileLoader(module_name, str(path))
    spec = importlib.util.spec_from_loader(module_name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickling inside the recipe look their module up here
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def _takes_positional(builder: Callable[..., Any]) -> bool:
    parameters = inspect.signature(builder).parameters.values()
    return any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def _overridable(builder: Callable[..., Any], *, skip_first: bool) -> dict[str, inspect.Parameter]:
    """The builder's parameters that can be given by keyword, without the split that `build_data` takes first."""
    parameters = list(inspect.signature(builder).parameters.values())[int(skip_first) :]
    return {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _annotation(builder: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The type that a value must have: the annotation, else the default's and its first item's type, else str."""
    annotation, default = parameter.annotation, parameter.default
    if annotation is parameter.empty:
        if type(default) in (tuple, list) and default:
            item = type(default[0])
            return list[item] if isinstance(default, list) else tuple[item, ...]  # type: ignore[valid-type]
        return str if default is None else type(default)
    if not isinstance(annotation, str):
        return annotation
    # Under `from __future__ import annotations` they are strings. Only this one is resolved: another may name a type
    # that exists for the type checker alone.
    function = inspect.unwrap(getattr(builder, "func", builder))
    if not hasattr(function, "__globals__"):  # an object with __call__
        function = inspect.unwrap(type(function).__call__)
    stub = types.SimpleNamespace(__annotations__={parameter.name: annotation})
    return typing.get_type_hints(stub, globalns=getattr(function, "__globals__", {}))[parameter.name]


def _parse_value(text: str, annotation: Any, *, where: str) -> Any:  # noqa: C901 - one branch a type
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _parse_value(text, members[0], where=where)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, members, where=where)
    if origin is typing.Literal:
        for choice in members:
            if text == str(choice):
                return choice
        choices = [str(choice) for choice in members]
        raise ConfigError(f"{where}: it must be one of {', '.join(choices)}.{_nearest(text, choices)}")
    if (origin or annotation) in (tuple, list, collections.abc.Sequence):
        return _parse_items(text, origin or annotation, members, where=where)
    if annotation is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise ConfigError(f"{where}: it must be true or false.")
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            kind = "a whole number" if annotation is int else "a number"
            raise ConfigError(f"{where}: it must be {kind}.") from None
    if annotation in (str, Any):
        return text
    raise ConfigError(
        f"{where}: a value of type {annotation!r} cannot be given by flag; change it in the recipe."
    )


def _parse_union(text: str, members: tuple[Any, ...], *, where: str) -> Any:
    if type(None) in members and text.lower() == "none":
        return None
    problems = []
    # str takes anything, so it comes last: with `str | int`, "3" means the number.
    for member in sorted((m for m in members if m is not type(None)), key=lambda m: m is str):
        try:
            return _parse_value(text, member, where=where)
        except ConfigError as error:
            problems.append(str(error).removeprefix(f"{where}: "))
    if type(None) in members:
        problems.append('"none" is also possible.')
    raise ConfigError(f"{where}: {' '.join(problems)}")


def _parse_items(text: str, sequence: Any, members: tuple[Any, ...], *, where: str) -> Any:
    items = [item.strip() for item in text.strip("()[]").split(",")]
    if items[-1] == "":  # the empty list, and a trailing comma
        items.pop()
    if sequence is tuple and members and members[-1] is not Ellipsis:
        if len(items) != len(members):
            raise ConfigError(
                f"{where}: it must be {len(members)} values separated by commas, got {len(items)}."
            )
        types_ = members
    else:
        types_ = (members[0] if members else str,) * len(items)
    values = [_parse_value(item, type_, where=where) for item, type_ in zip(items, types_, strict=True)]
    return values if sequence is list else tuple(values)
