"""The files of `launch/` that the launcher renders are what it renders, by the commands that the docs give."""

import re
import shlex
from pathlib import Path

import pytest

from tfdist.launcher.flags import parse_flags

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "machines.md").read_text().replace("\\\n", " ")
COMMANDS = dict(re.findall(r"^python -m tfdist\.launch (.*--dry_run.*) > (launch/\S+)$", PAGE, re.MULTILINE))
FILES = {file: words for words, file in COMMANDS.items()}


@pytest.mark.parametrize("file", FILES)
def test_file_is_what_its_command_renders(file):
    flags = parse_flags(shlex.split(FILES[file]), {})
    assert flags.dry_run
    assert (REPOSITORY / file).read_text() == flags.backend.render(flags.job, flags.place)


def test_every_rendered_file_has_its_command():
    files = [*(REPOSITORY / "launch").glob("*.sbatch"), *(REPOSITORY / "launch").glob("kubernetes/*")]
    assert {str(path.relative_to(REPOSITORY)) for path in files} == set(FILES)
