"""The report as a person opens it: in a real browser, on a phone and on a desktop, light and dark."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

FAKE = runpy.run_path(str(Path(__file__).parents[1] / "fake_run.py"))
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
)
SIZES = [(390, 844), (1280, 900)]


def find_browser() -> str | None:
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


BROWSER = find_browser()
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}, and $CHROMIUM is not set"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "finished": write_report(FAKE["write_fake_run"](folder / "finished")),
        "unfinished": write_report(FAKE["write_fake_run"](folder / "unfinished", finished=False)),
        "hacked": write_report(FAKE["hack"](FAKE["write_fake_run"](folder / "hacked"))),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.mark.parametrize("size", SIZES, ids=["phone", "desktop"])
@pytest.mark.parametrize("state", ["finished", "unfinished", "hacked"])
def test_report_in_a_browser(browser: Any, reports: dict[str, Path], state: str, size: tuple[int, int]):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(reports[state].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")

    widths = page.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert len(widths) == {"finished": 2, "unfinished": 1, "hacked": 3}[state]
    assert min(widths) > 0

    charts = page.evaluate(
        """[...document.querySelectorAll('svg.chart')].map(svg => {
            const frame = svg.getBoundingClientRect();
            const marks = [...svg.querySelectorAll('.line, .area, .bar')].map(m => m.getBoundingClientRect());
            return {label: svg.getAttribute('aria-label'), width: frame.width, height: frame.height,
                    drawn: marks.some(m => m.width > 1 || m.height > 1)};
        })"""
    )
    assert len(charts) >= 15
    for chart in charts:
        assert chart["width"] > 200, chart
        assert chart["height"] > 100, chart
        assert chart["drawn"], chart
    labels = {chart["label"] for chart in charts}
    assert {"verifier on held-out prompts against network evaluations", "Seconds by stage"} <= labels

    first = page.evaluate("document.querySelector('#hacking').getBoundingClientRect().top")
    assert first < 1.2 * size[1]  # seen without looking for it
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg.chart text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 9  # pixels: still legible on the phone

    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [reports[state].as_uri()]
    assert page.title().startswith("fake")  # the prompt that is a script did not run
    page.close()


def test_colours_follow_the_readers_choice(browser: Any, reports: dict[str, Path]):
    def brightness(scheme: str) -> tuple[float, float]:
        page = browser.new_page(color_scheme=scheme)
        page.goto(reports["finished"].as_uri())
        numbers = "getComputedStyle(document.body).{}.match(/[0-9]+/g).slice(0, 3).map(Number)"
        ink, paper = (sum(page.evaluate(numbers.format(key))) for key in ("color", "backgroundColor"))
        page.close()
        return ink, paper

    ink, paper = brightness("light")
    assert paper - ink > 3 * 128
    ink, paper = brightness("dark")
    assert ink - paper > 3 * 128
