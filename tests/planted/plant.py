"""Plants each fault of this folder in a copy of the repository, and sees which test finds it.

    python tests/planted/plant.py                    # every fault
    python tests/planted/plant.py data_ loss_        # those whose names begin so
    python tests/planted/plant.py --table=docs/planted.md

A fault is a patch, `NAME.patch`: first what is wrong in a sentence, then `tests:` and the tests that should see it, as
pytest takes them, then the difference as `git diff` writes it. A fault is found when one of these tests fails.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
HEAD = """# Planted faults

Each is a small, likely way to be wrong. `make planted` plants it in a copy of the repository and runs the tests that
should see it; the last column is the first of them that failed. All of them belong to what `python -m pytest` runs.

    make planted

"""


@dataclass(frozen=True)
class Fault:
    """A fault: what is wrong, who should see it, and the patch."""

    name: str
    sentence: str
    tests: tuple[str, ...]
    patch: Path

    @property
    def place(self) -> str:
        """The file that it changes."""
        return re.findall(r"^\+\+\+ b/(\S+)", self.patch.read_text(), re.MULTILINE)[0]


def read_fault(patch: Path) -> Fault:
    """Reads a patch's head."""
    head = patch.read_text().partition("\ndiff --git ")[0]
    sentence, _, tests = head.partition("\ntests:")
    return Fault(patch.stem, " ".join(sentence.split()), tuple(tests.split()), patch)


def read_faults() -> list[Fault]:
    """Returns all, by name."""
    return [read_fault(patch) for patch in sorted(FOLDER.glob("*.patch"))]


def copy_repository(folder: Path) -> None:
    """Copies what git tracks, and what it would."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    # Files that were removed and not yet committed are listed too.
    present = "\0".join(name for name in names.split("\0") if (REPOSITORY / name).is_file())
    pack = ["tar", "--create", "--null", "--files-from=-"]
    packed = subprocess.run(pack, cwd=REPOSITORY, check=True, capture_output=True, input=present.encode())
    subprocess.run(["tar", "--extract"], cwd=folder, check=True, input=packed.stdout)


def find(fault: Fault) -> str:
    """Plants a fault and runs its tests; returns the first that failed, "" if none did.

    Raises:
        RuntimeError: If the patch does not apply, or pytest found no test or could not run.
    """
    with tempfile.TemporaryDirectory(prefix="tfdist-planted-") as name:
        copy_repository(Path(name))
        applied = subprocess.run(["git", "apply", str(fault.patch)], cwd=name, capture_output=True, text=True)
        if applied.returncode:
            raise RuntimeError(f"{fault.patch}: {applied.stderr}")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", *fault.tests]
        env = {**os.environ, "PYTHONPATH": name, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=name, env=env, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}")
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return failed[0] if failed else ""


def write_table(path: Path, rows: dict[str, str]) -> None:
    """Writes the table of all faults; one that was not tried now keeps the row that it has."""
    if path.exists():
        known = re.findall(r"^(\| (.+?) \| `.*\n)", path.read_text(), re.MULTILINE)
        rows = {sentence: row for row, sentence in known} | rows
    kept = [rows[fault.sentence] for fault in read_faults() if fault.sentence in rows]
    versions = f"Python {platform.python_version()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}.\n\n"
    table = "| fault | planted in | seconds | found by |\n|---|---|---|---|\n"
    path.write_text(HEAD + versions + table + "".join(kept))


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="how the faults' names begin; none: all")
    parser.add_argument("--table", metavar="FILE", type=Path, help="write what was found here, after each")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="so many side by side")
    flags = parser.parse_args()
    faults = [f for f in read_faults() if not flags.names or f.name.startswith(tuple(flags.names))]

    def try_out(fault: Fault) -> tuple[str, float]:
        start = time.monotonic()
        try:
            finder = find(fault)
        except RuntimeError as error:  # the others are tried all the same
            print(error, file=sys.stderr)
            finder = ""
        return finder, time.monotonic() - start

    rows: dict[str, str] = {}
    num_found = 0
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        for number, (fault, (finder, secs)) in enumerate(
            zip(faults, pool.map(try_out, faults), strict=True), 1
        ):
            num_found += bool(finder)
            said = f"{number}/{len(faults)}  {fault.name}: {finder or 'NOBODY FOUND IT'} ({secs:.0f} s)"
            print(said, flush=True)
            row = f"| {fault.sentence} | `{fault.place}` | {secs:.0f} | `{finder or 'nobody'}` |\n"
            rows[fault.sentence] = row
            if flags.table:
                write_table(flags.table, rows)
    print(f"{num_found} of {len(faults)} faults found")
    return 1 if num_found < len(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
