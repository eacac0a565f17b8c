import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest

from tfdist.errors import ConfigError
from tfdist.recipe import (
    RECIPES_DIR,
    Recipe,
    check_recipe_exists,
    list_recipes,
    load_recipe,
    parse_overrides,
    resolve_recipe_name,
)

SOURCE = """\
from __future__ import annotations
import dataclasses
from typing import TYPE_CHECKING, Literal
from tfdist import Recipe
if TYPE_CHECKING:
    from nowhere import Thing

@dataclasses.dataclass
class Inside:
    number: int = 3

def build_model(*, units: int = 4, kind: Literal["a", "b"] = "a", thing: Thing = None):
    return Inside(units)

def build_data(split, *, units: int = 4, noise: float | None = None):
    return split, units, noise

RECIPE = Recipe(build_model=build_model, build_data=build_data, global_batch_size=8, epochs=2)
"""

OBJECT_SOURCE = """\
from __future__ import annotations
import functools
from typing import Literal, Optional
from tfdist import Recipe

class Model:
    def __call__(self, *, kind: Literal["a", "b"] = "a"):
        return kind

class Data:
    def __call__(self, split, *, scale=1, noise: Optional[float] = None):
        return split, noise

build_data = functools.partial(Data(), scale=2)
RECIPE = Recipe(build_model=Model(), build_data=build_data, global_batch_size=8, epochs=2)
"""


@pytest.fixture(autouse=True)
def own_imports(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in [name for name in sys.modules if name not in before]:
        if name.startswith(("tfdist_recipes_", "recipe_of_mine", "package_of_mine")):
            del sys.modules[name]


def model_of_nothing(*, units: int = 4):
    return units


def data_of_nothing(split, *, units: int = 4):
    return split, units


def build_recipe(**changes):
    fields = {
        "build_model": model_of_nothing,
        "build_data": data_of_nothing,
        "global_batch_size": 8,
        "epochs": 2,
    }
    return Recipe(**(fields | changes))


def recipe_with(annotation, default=None):
    """A recipe whose model has one parameter `v` of this type."""

    def build_model(*, v=default):
        return v

    if annotation is not None:
        build_model.__annotations__["v"] = annotation
    return build_recipe(build_model=build_model, build_data=lambda split: split)


def parse_one(annotation, text, default=None):
    model_kwargs, data_kwargs = parse_overrides(recipe_with(annotation, default), [f"v={text}"])
    assert data_kwargs == {}
    return model_kwargs["v"]


@pytest.mark.parametrize("field", ["global_batch_size", "epochs"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, None])
def test_recipe_refuses_what_is_no_whole_number(field, value):
    with pytest.raises(ConfigError, match=f"{field}=.*whole number of at least 1"):
        build_recipe(**{field: value})


@pytest.mark.parametrize("field", ["build_model", "build_data"])
def test_recipe_refuses_a_builder_that_was_already_called(field):
    with pytest.raises(ConfigError, match=f"{field}=.*pass it without calling it"):
        build_recipe(**{field: 3})


@pytest.mark.parametrize(
    ("field", "builder"),
    [
        ("build_model", lambda units: units),
        ("build_model", lambda *, a=1, units: units),
        ("build_data", lambda split, units: units),
        ("build_data", lambda split, *, units: units),
    ],
)
def test_recipe_refuses_a_parameter_without_default(field, builder):
    with pytest.raises(ConfigError, match=rf"{field}=.*'units' has no default"):
        build_recipe(**{field: builder})


@pytest.mark.parametrize(
    ("field", "builder"),
    [
        ("build_model", lambda units=4, /: units),
        ("build_data", lambda split, units=4, /: units),
    ],
)
def test_recipe_refuses_a_parameter_without_a_name_to_give_it_by(field, builder):
    with pytest.raises(ConfigError, match=rf"{field}=.*'units' cannot be given by name; move the '/'"):
        build_recipe(**{field: builder})


@pytest.mark.parametrize("field", ["build_model", "build_data"])
def test_recipe_refuses_a_builder_of_unknown_parameters(field):
    with pytest.raises(ConfigError, match=f"{field}=<class 'dict'>.*pass a function that calls it"):
        build_recipe(**{field: dict})


@pytest.mark.parametrize("builder", [lambda: None, lambda *, split="train": None, lambda **kwargs: None])
def test_recipe_refuses_data_that_takes_no_split(builder):
    with pytest.raises(ConfigError, match=r"build_data=.*must take the split"):
        build_recipe(build_data=builder)


@pytest.mark.parametrize(
    "changes",
    [
        {"build_model": lambda: None},
        {"build_model": lambda units=4: None},
        {"build_model": lambda *args, **kwargs: None},
        {"build_model": functools.partial(model_of_nothing, units=2)},
        {"build_data": lambda split: None},
        {"build_data": lambda split, /: None},
        {"build_data": lambda *args: None},
        {"build_data": lambda split="train", /, *, noise=0.1, **kwargs: None},
    ],
)
def test_recipe_takes_builders_that_run_without_flags(changes):
    recipe = build_recipe(**changes)
    recipe.build_model()
    recipe.build_data("train")


def test_recipe_takes_fields_by_keyword_alone_and_keeps_them():
    with pytest.raises(TypeError):
        Recipe(model_of_nothing, data_of_nothing, 8, 2)
    with pytest.raises(AttributeError):
        build_recipe().epochs = 3


def test_list_recipes_names_every_file_with_its_first_line():
    listed = list_recipes()
    assert [name for name, _ in listed] == sorted(
        path.stem for path in RECIPES_DIR.glob("*.py") if not path.stem.startswith("_")
    )
    assert "digits_cnn" in dict(listed)
    for name, line in listed:
        assert line and line in (RECIPES_DIR / f"{name}.py").read_text(encoding="utf-8")
        assert "\n" not in line


def test_list_recipes_imports_no_tensorflow():
    code = (
        "import sys; from tfdist.recipe import list_recipes; list_recipes();"
        "print(*sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=RECIPES_DIR.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["digits_cnn", "digits-cnn"])
def test_load_recipe_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("raise RuntimeError('a folder of the same name')")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe)
    assert Path(recipe.build_model.__code__.co_filename) == RECIPES_DIR / "digits_cnn.py"


def test_load_recipe_by_dotted_module(tmp_path, monkeypatch):
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "__init__.py").touch()
    (tmp_path / "package_of_mine" / "first.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_recipe("package_of_mine.first") is sys.modules["package_of_mine.first"].RECIPE


@pytest.mark.parametrize("folder", ["plain", "with a space", "with.dot"])
def test_load_recipe_by_path(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "recipe_of_mine.py"
    path.write_text(SOURCE)
    absolute = load_recipe(str(path))
    monkeypatch.chdir(tmp_path / folder)
    for name in ("recipe_of_mine.py", "./recipe_of_mine.py", f"../{folder}/recipe_of_mine.py"):
        recipe = load_recipe(name)
        assert recipe.build_data("test") == absolute.build_data("test") == ("test", 4, None)
        assert resolve_recipe_name(name).endswith(f"{folder}/recipe_of_mine.py")
        assert Path(resolve_recipe_name(name)).is_absolute()


def test_load_recipe_by_path_needs_no_py_ending(tmp_path):
    (tmp_path / "recipe of mine").write_text(SOURCE)
    assert load_recipe(str(tmp_path / "recipe of mine")).epochs == 2


def test_load_recipe_by_path_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe_of_mine.py").write_text(SOURCE)
    assert load_recipe("~/recipe_of_mine.py").global_batch_size == 8


def test_load_recipe_by_path_finds_modules_beside_it_but_after_installed_ones(tmp_path):
    (tmp_path / "recipe_of_mine_parts.py").write_text("EPOCHS = 7")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('hides an installed module')")
    path = tmp_path / "recipe_of_mine.py"
    path.write_text(
        SOURCE.replace("epochs=2", "epochs=EPOCHS").replace(
            "import dataclasses", "import dataclasses, colorsys\nfrom recipe_of_mine_parts import EPOCHS"
        )
    )
    assert load_recipe(str(path)).epochs == 7
    assert sys.path[-1] == str(tmp_path)


def test_resolve_recipe_name_leaves_names_and_modules():
    assert resolve_recipe_name("digits_cnn") == "digits_cnn"
    assert resolve_recipe_name("package_of_mine.first") == "package_of_mine.first"


@pytest.mark.parametrize(
    ("ending", "message"),
    [("", "has no RECIPE; end the module with: RECIPE = "), ("RECIPE = 3\n", "has a RECIPE of type int")],
)
def test_load_recipe_refuses_a_module_without_recipe(ending, message, tmp_path):
    path = tmp_path / "recipe_of_mine.py"
    path.write_text(f"X = 1\n{ending}")
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digit_cnn",
            "no recipe 'digit_cnn'. Did you mean 'digits_cnn'[?] Choose one of deep_lm, digits_cnn, ",
        ),
        ("zzz", "no recipe 'zzz'. Choose one of deep_lm, digits_cnn, "),
        ("./nothing.py", "no recipe file '/.*/nothing.py'"),
        ("package_of_mine.zzz", "no module 'package_of_mine'"),
        ("json.zzz", "no module 'json.zzz'"),
        (".foo", "'.foo' starts with a dot, .*; write the whole module"),
        ("..", "'..' starts with a dot"),
    ],
)
def test_load_recipe_unknown(name, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [("digit_cnn", "Did you mean 'digits_cnn'"), ("./nothing.py", "no recipe file '/.*/nothing.py'")],
)
def test_check_recipe_exists_refuses_an_unknown_one(name, message):
    with pytest.raises(ConfigError, match=message):
        check_recipe_exists(name)


@pytest.mark.parametrize(
    "source",
    [
        SOURCE,
        "if True:\n    RECIPE = 3",
        "RECIPE: int = 3",
        "from elsewhere import RECIPE",
        "from elsewhere import other as RECIPE",
        "from elsewhere import *",
        "a b",
    ],
)
def test_check_recipe_exists_imports_nothing(source, tmp_path):
    (tmp_path / "recipe_of_mine.py").write_text(source)
    before = set(sys.modules)
    check_recipe_exists(str(tmp_path / "recipe_of_mine.py"))
    check_recipe_exists("digits-cnn")
    check_recipe_exists("package_of_mine.not_looked_at")
    imported = set(sys.modules) - before
    assert not any(name.startswith(("tfdist_recipes_", "package_of_mine")) for name in imported)


def test_check_recipe_exists_refuses_a_file_without_recipe(tmp_path):
    (tmp_path / "recipe_of_mine.py").write_text("recipe = 'RECIPE'")
    with pytest.raises(ConfigError, match="has no RECIPE; end the module with"):
        check_recipe_exists(str(tmp_path / "recipe_of_mine.py"))


def test_load_recipe_finds_the_file_beside_it_and_no_other(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "neighbour.py").write_text(f"WHO = {name!r}")
        source = f"{SOURCE}\nfrom .neighbour import WHO\n"
        (tmp_path / name / "recipe_of_mine.py").write_text(source)
    for name in ("one", "two"):
        recipe = load_recipe(str(tmp_path / name / "recipe_of_mine.py"))
        module = sys.modules[recipe.build_model.__module__]
        assert name == module.WHO
    assert "neighbour" not in sys.modules


def test_load_recipe_unknown_points_at_the_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe_of_mine.py").write_text(SOURCE)
    with pytest.raises(ConfigError, match="For the file here write --recipe=./recipe_of_mine.py"):
        load_recipe("recipe_of_mine")


@pytest.mark.parametrize(
    ("source", "error"),
    [("1 / 0", ZeroDivisionError), ("import package_of_nobody", ModuleNotFoundError), ("a b", SyntaxError)],
)
def test_load_recipe_passes_on_the_modules_own_error(source, error, tmp_path, monkeypatch):
    (tmp_path / "recipe_of_mine.py").write_text(source)
    with pytest.raises(error):
        load_recipe(str(tmp_path / "recipe_of_mine.py"))
    assert not any(name.endswith("recipe_of_mine") for name in sys.modules)

    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "broken.py").write_text(source)
    # Not by `syspath_prepend`: it would bring back, after the test, the folder that `load_recipe` has added above.
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(error):
        load_recipe("package_of_mine.broken")


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "12", 12),
        (int, " -3 ", -3),
        (float, "1e-3", 1e-3),
        (float, "2", 2.0),
        (bool, "true", True),
        (bool, "No", False),
        (bool, "1", True),
        (bool, "OFF", False),
        (str, "a=b", "a=b"),
        (str, "", ""),
        (str, "none", "none"),
        (Any, "x", "x"),
        (Optional[float], "none", None),  # noqa: UP045 - users write it so
        (Optional[float], "0.5", 0.5),  # noqa: UP045 - users write it so
        (float | None, "None", None),
        (int | float, "3", 3),
        (int | float, "3.5", 3.5),
        (str | int, "3", 3),
        (str | int, "x", "x"),
        (Literal["adam", "sgd"], "sgd", "sgd"),
        (Literal[1, 2], "2", 2),
        (Literal["adam"] | None, "none", None),
        (tuple[int, ...], "128,64", (128, 64)),
        (tuple[int, ...], "(128, 64)", (128, 64)),
        (tuple[int, ...], "128,", (128,)),
        (tuple[int, ...], "", ()),
        (tuple[int, str], "3,a", (3, "a")),
        (tuple[int, ...] | None, "none", None),
        (tuple[int, ...] | None, "1,2", (1, 2)),
        (list[float], "[0.5, 1]", [0.5, 1.0]),
        (Sequence[str], "a, b", ("a", "b")),
        (Annotated[int, "at least 1"], "3", 3),
        (Annotated[int, "at least 1"] | None, "3", 3),
    ],
)
def test_parse_overrides_types_by_annotation(annotation, text, value):
    parsed = parse_one(annotation, text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        (4, "5", 5),
        (0.5, "1", 1.0),
        (True, "no", False),
        (None, "x", "x"),
        ((128, 64), "3,4", (3, 4)),
        ((128, 64), "3", (3,)),
        ([0.5], "1, 2", [1.0, 2.0]),
        (("a",), "1,2", ("1", "2")),
        ((), "1,2", ("1", "2")),
    ],
)
def test_parse_overrides_types_by_default_without_annotation(default, text, value):
    parsed = parse_one(None, text, default)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        (int, "2.5", "--set v=2.5: it must be a whole number"),
        (int, "", "a whole number"),
        (float, "fast", "it must be a number"),
        (bool, "2", "it must be true or false"),
        (int | None, "x", 'a whole number. "none" is also possible'),
        (Literal["adam", "sgd"], "sdg", "one of adam, sgd. Did you mean 'sgd'[?]"),
        (tuple[int, int], "1,2,3", "it must be 2 values separated by commas, got 3"),
        (tuple[int, ...], "1,x", "a whole number"),
        (dict[str, int], "a:1", "cannot be given by flag"),
        (bytes, "a", "cannot be given by flag"),
    ],
)
def test_parse_overrides_refuses_what_does_not_fit(annotation, text, message):
    with pytest.raises(ConfigError, match=message):
        parse_one(annotation, text)


def test_parse_overrides_resolves_annotations_that_are_strings(tmp_path):
    (tmp_path / "recipe_of_mine.py").write_text(SOURCE)
    recipe = load_recipe(str(tmp_path / "recipe_of_mine.py"))
    assert parse_overrides(recipe, ["kind=b", "noise=0.5"]) == ({"kind": "b"}, {"noise": 0.5})


def test_parse_overrides_of_an_object_with_call(tmp_path):
    (tmp_path / "recipe_of_mine.py").write_text(OBJECT_SOURCE)
    recipe = load_recipe(str(tmp_path / "recipe_of_mine.py"))
    assert parse_overrides(recipe, ["kind=b", "noise=0.5"]) == ({"kind": "b"}, {"noise": 0.5})


def test_parse_overrides_of_a_partial():
    recipe = build_recipe(build_model=functools.partial(model_of_nothing, units=2))
    assert parse_overrides(recipe, ["units=9"])[0] == {"units": 9}


def test_parse_overrides_gives_a_shared_name_to_both_builders_and_takes_the_last():
    assert parse_overrides(build_recipe(), ["units=3", "units=5"]) == ({"units": 5}, {"units": 5})
    assert parse_overrides(build_recipe(), []) == ({}, {})


def test_parse_overrides_gives_the_data_dir_to_who_takes_one():
    takes = build_recipe(build_data=lambda split, *, data_dir=None: data_dir)
    assert parse_overrides(takes, [], data_dir="a") == ({}, {"data_dir": "a"})
    assert parse_overrides(takes, ["data_dir=b"], data_dir="a")[1] == {"data_dir": "b"}
    assert parse_overrides(takes, [])[1] == {}
    assert parse_overrides(build_recipe(), [], data_dir="a") == ({}, {})


@pytest.mark.parametrize("override", ["unit=3", "split=test", "zzz=1"])
def test_parse_overrides_of_an_unknown_name_lists_the_known_ones(override):
    def build_data(split, *, noise=0.5, units=4):
        return split

    with pytest.raises(ConfigError, match=r"defaults: noise=0\.5, units=4\.$") as caught:
        parse_overrides(build_recipe(build_data=build_data), [override])
    assert ("Did you mean 'units'?" in str(caught.value)) == (override == "unit=3")


def test_parse_overrides_of_a_recipe_without_settings_says_so():
    recipe = build_recipe(build_model=lambda: None, build_data=lambda split: None)
    with pytest.raises(ConfigError, match="defaults: none at all"):
        parse_overrides(recipe, ["a=1"])


@pytest.mark.parametrize("override", ["units", "=3", " =3", ""])
def test_parse_overrides_wants_name_and_value(override):
    with pytest.raises(ConfigError, match="write it as name=value"):
        parse_overrides(build_recipe(), [override])
