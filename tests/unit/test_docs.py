"""What the docs show is there, and their programs run."""

import ast
import contextlib
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import tfdist
import tfdist.layers
import tfdist.optimizers

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
MODULES = (tfdist, tfdist.layers, tfdist.optimizers)
# Tuples of names have no docstring of their own.
PUBLIC = [
    f"{module.__name__}.{name}"
    for module in MODULES
    for name in module.__all__
    if not isinstance(getattr(module, name), tuple)
]


def find(name):
    module, _, name = name.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_page_has_every_public_name():
    assert sorted(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE)) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_example_of_a_public_name_runs(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(find(name))
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, f"{name} has no example"
    found = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=found.append)
    assert not found, "".join(found)


def test_readme_is_read_in_a_minute():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 90


def test_programs_of_the_porting_page_run(tmp_path, monkeypatch):
    """One after another, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    known = {"__name__": "__main__"}
    page = (DOCS / "porting.md").read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        line = page.count("\n", 0, match.start(1))
        with contextlib.redirect_stdout(None):
            exec(compile("\n" * line + match[1], "porting.md", "exec"), known)  # noqa: S102
    assert (tmp_path / "model.keras").exists() and list(tmp_path.glob("checkpoints/*.npz"))


def find_messages():
    """Returns every text of the package, with `…` where a value is put in."""
    texts = {"Your input ran out of data; interrupting training"}
    for path in (REPOSITORY / "tfdist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = ["…" if isinstance(part, ast.FormattedValue) else part.value for part in node.values]
                texts.add("".join(parts))
    return texts


def test_messages_that_are_explained_are_ours():
    messages = "\n".join(find_messages())
    explained = re.findall(r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(explained) > 15
    assert [message for message in explained if message not in messages] == []
