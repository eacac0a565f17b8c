"""Every run ends with its report, which a browser can read; also one that died."""

import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import programs
import pytest

pytestmark = pytest.mark.cluster
SHORT = ["--steps_per_epoch=2", "--epochs=2"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    monkeypatch.delenv("TFDIST_REPORT")


def train(folder, *flags):
    return programs.run(["-m", "tfdist.train", "--run_dir=run", *flags], cwd=folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("TFDIST_REPORT")
        done = train(folder, "--strategy=multiworker", *SHORT)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_run_ends_with_its_report(finished):
    folder, done = finished
    assert done.stdout.splitlines()[-1] == "the report is in run/report.html"
    page = (folder / "run/report.html").read_text()
    assert "Finished." in page and "worker 1" in page and page.count("data:image/png") > 4
    assert "test accuracy" in page and "steps_per_epoch" in page


def test_run_that_died_has_one_too(tmp_path):
    flags = ["--optimizer=sgd", "--learning_rate=1e30", "--epochs=1", "--steps_per_epoch=4"]
    for strategy in ("one_device", "ps"):
        folder = tmp_path / strategy
        folder.mkdir()
        done = train(folder, f"--strategy={strategy}", *flags)
        assert done.returncode == 1, done.stderr
        assert "the report is in" in done.stdout
        page = (folder / "run/report.html").read_text()
        assert "Failed." in page and "is not finite" in page


def test_refused_run_leaves_the_earlier_ones_report(finished):
    folder, _ = finished
    before = {path: path.read_bytes() for path in (folder / "run").glob("*.*")}
    for flags in (["--strategy=one_device"], ["--strategy=one_device", "--resume", "--recipe=wide_deep"]):
        done = train(folder, *flags)
        assert done.returncode == 2, done.stdout
        assert "report" not in done.stdout
    assert {path: path.read_bytes() for path in (folder / "run").glob("*.*")} == before


def test_none_is_written_where_none_is_wanted(tmp_path):
    done = train(tmp_path, "--report=off", *SHORT)
    assert done.returncode == 0 and "report" not in done.stdout
    assert not (tmp_path / "run/report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look at the page with")
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_shows_it(finished, tmp_path, width):
    picture = tmp_path / "page.png"
    words = [
        *(
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path}/profile",
        ),
        *("--enable-logging=stderr", f"--window-size={width},2400", f"--screenshot={picture}"),
    ]
    done = subprocess.run(
        [CHROMIUM, *words, f"file://{finished[0]}/run/report.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.exists(), done.stderr
    assert "CONSOLE" not in done.stderr  # neither an error nor a warning of the page
    image = matplotlib.image.imread(picture)[..., :3]
    assert image.shape[1] == width
    # Something stands in most of its bands, and nothing runs out at the right.
    bands = [band.std() for band in image[: 20 * (len(image) // 20)].reshape(20, -1, 3)]
    assert sum(spread > 0.01 for spread in bands) > 10
    assert image[:, -3:].std() < 0.01


def test_command_that_opens_it_is_said(finished):
    assert re.search(r"the run is in run$", finished[1].stdout, re.MULTILINE)
    assert Path(finished[0], "run/results.json").exists()
