"""What a user sees: the real server with our flags, the page of a real sweep, a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvsharer_exp.values.ports import free_port
from tests.browser import CHROMIUM, Page, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: install chromium"),
]
OFFLINE = "--host-resolver-rules=MAP * 0.0.0.0, EXCLUDE 127.0.0.1"
UI_SECONDS = 10.0  # on two idle cores; neighbours slow it, so the test allows three times that
UI_MIB = 600.0


@dataclass(frozen=True)
class Store:
    """A finished sweep and the UI on its store."""

    folder: Path
    result: dict
    address: str
    seconds: float
    resident_mib: float

    @property
    def host(self) -> str:
        return self.address.partition("/#")[0]

    @property
    def members(self) -> list[dict]:
        return self.result["front"]

    def moved(self, url: str) -> str:
        """The address with this server's port."""
        return url.replace("http://127.0.0.1:5000", self.host)


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "kvsharer_exp", *words, f"hydra.run.dir={folder}"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("browsed")
    sweep = command(folder / "sweep", "sweep", "model=tiny", "study.n_trials=12", "study.margin=9")
    quick = ["calibration.num_windows=4", "scoring.report.limit=2", "heldout.num_windows=2"]
    subprocess.run([*sweep, *quick], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((folder / "sweep" / "result.json").read_text(encoding="utf-8"))
    port = free_port()
    started = time.monotonic()
    server = subprocess.Popen(
        command(folder / "ui", "ui", f"ui.port={port}"),
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        address = next(line for line in server.stdout if "Ctrl-C" in line).split()[0]
        seconds = time.monotonic() - started
        yield Store(folder, result, address, seconds, proportional_mib(server.pid))
    finally:
        started_by_it = processes(server.pid)
        server.terminate()
        assert server.wait(20) == 0
        assert not [pid for pid in started_by_it if Path(f"/proc/{pid}/cmdline").exists()]


def processes(pid: int) -> list[int]:
    """The process and all it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in processes(int(child)))]


def proportional_mib(pid: int) -> float:
    """Memory of the process and all it started; a page that n share counts 1/n in each."""
    rollups = [Path(f"/proc/{one}/smaps_rollup").read_text() for one in processes(pid)]
    shares = [re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE) for rollup in rollups]
    return sum(int(share[1]) for share in shares if share is not None) / 1024


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile"), OFFLINE, size=(1500, 2600)) as opened:
        yield opened


def shows(page: Page, text: str) -> None:
    page.wait(f"document.body && document.body.innerText.includes({json.dumps(text)})")


def test_the_ui_is_up_soon_and_light(store: Store) -> None:
    assert store.seconds < 3 * UI_SECONDS
    assert store.resident_mib < UI_MIB


def test_the_address_that_is_printed_lists_the_runs(store: Store, page: Page) -> None:
    page.open(store.address)
    shows(page, "tiny · sweep")
    shows(page, "wikipedia")  # the data set, in its column
    assert page.errors == []


def test_the_saved_link_compares_the_front(store: Store, page: Page) -> None:
    page.open(store.moved(store.result["mlflow_compare_url"]))
    for member in store.members:
        shows(page, f"tiny · {member['num_shared']}/6 shared · kl {member['scores']['kl']:.3g}")
    shows(page, f"{len(store.members)} matching runs")
    shows(page, "The front")
    points = "document.querySelectorAll('.scatterlayer .point').length"
    page.wait(f"{points} >= {2 * len(store.members)}")
    page.wait("document.querySelector('.barlayer .point')")
    page.wait("document.querySelector('.parcoords')")
    assert page.errors == []


def test_the_same_link_as_a_table_has_the_scores_as_columns(store: Store, page: Page) -> None:
    url = store.moved(store.result["mlflow_compare_url"])
    page.open(url.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    for column in ("Metrics", "kl", "kv_fraction"):
        shows(page, column)
    shows(page, f"{len(store.members)} matching runs")


def test_the_run_describes_itself_and_charts_the_search(store: Store, page: Page) -> None:
    run = store.address.replace("/runs?", f"/runs/{store.result['mlflow_run_id']}?")
    page.open(run)
    shows(page, "Description")
    shows(page, "Compare the front")
    page.open(run.replace("?", "/model-metrics?"))
    for chart in ("hypervolume", "trials_per_minute", "best_loss"):
        shows(page, chart)
    page.wait("document.querySelector('.scatterlayer .lines path, .scatterlayer .point')")


def test_the_front_is_listed_as_models(store: Store, page: Page) -> None:
    page.open(store.address.replace("/runs?", "/models?"))
    for member in store.members:
        shows(page, f"tiny - {member['num_shared']}-6 shared")


def test_the_report_renders_inside_the_ui(store: Store, page: Page) -> None:
    run = store.address.replace("/runs?", f"/runs/{store.result['mlflow_run_id']}?")
    page.open(run.replace("?", "/artifacts/front.html?"))
    page.wait("document.querySelector('iframe')")
    page.wait("document.querySelectorAll('.scatterlayer .point').length > 3", framed=True)


def test_the_report_renders_from_its_file_without_a_network(store: Store, tmp_path: Path) -> None:
    with browser(tmp_path, "--host-resolver-rules=MAP * 0.0.0.0", size=(1200, 3000)) as page:
        page.open((store.folder / "sweep" / "front.html").as_uri())
        page.wait("document.querySelectorAll('.scatterlayer .point').length > 3")
        shows(page, "Serve one")
        loaded = page.run("[...document.images].map(i => i.complete && i.naturalWidth > 99)")
        assert loaded == [True] * 4
        assert page.errors == []
        assert {url.partition(":")[0] for url in page.requests} == {"file", "data"}
        too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not page.run(too_wide)
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 50_000
