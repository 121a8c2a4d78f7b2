"""report.html in a headless Chromium: light and dark, narrow and wide. Skipped without one; `make test` has one."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reported import compared, drawn, hostile, material

from evaluator import html_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
BUNDLED = Path(sys.prefix) / "chromium"  # where `make test` puts it
SWEEP = {"loads": ["concurrency 1", "concurrency 4", "concurrency 16"], "slo": {"latency": 0.3}}
SERVER = {"ul2": {"requests": 400, "executions": 60, "queue_s": 0.012, "compute_s": 0.15}}

REPORTS: dict[str, Callable[[], html_report.Material]] = {
    "everything": lambda: compared(
        material(drawn(400, 240, streamed=True, failed=0.02), wall_s=240, options=SWEEP, server=SERVER), "INCONCLUSIVE"
    ),
    "two seconds": lambda: compared(material(drawn(60, 2), wall_s=2), "FAIL", -0.5),
    "nothing completed": lambda: material(drawn(5, 1, failed=1.1)),
    "hostile": lambda: compared(hostile(), "PASS"),
}

CONTRAST = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
  const behind = e => { for (; e; e = e.parentElement) {
    const found = parts(getComputedStyle(e).backgroundColor); if (found.length == 3 || found[3] == 1) return found }
    return parts(getComputedStyle(document.body).backgroundColor) }
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05) }
  const low = []
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  let texts = 0
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement
    if (!walk.currentNode.data.trim() || ['title', 'desc'].includes(e.tagName) || !e.getClientRects().length) continue
    texts++
    const style = getComputedStyle(e), colour = parts(e instanceof SVGElement ? style.fill : style.color)
    const found = ratio(colour, behind(e))
    if (found < 4.5) low.push([e.outerHTML.slice(0, 120), found])
  }
  for (const e of document.querySelectorAll('path.line, rect.bar, .span path, .limit')) {
    if (!e.getClientRects().length) continue
    const style = getComputedStyle(e), found = ratio(parts(e.tagName == 'rect' ? style.fill : style.stroke), behind(e))
    if (found < 3) low.push([e.outerHTML.slice(0, 120), found])
  }
  return { texts, low }
}"""

# Words of a chart that stand outside it, or on each other.
CHARTS = """() => {
  const faults = []
  const shown = [...document.querySelectorAll('svg')].filter(svg => svg.getClientRects().length)
  for (const svg of shown) {
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')]
    const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()])
    boxes.forEach(([told, box], number) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 2
          || box.bottom > frame.bottom + 2) faults.push(['outside', told, svg.ariaLabel])
      for (const [other, with_] of boxes.slice(number + 1))
        if (box.left < with_.right - 1 && with_.left < box.right - 1
            && box.top < with_.bottom - 3 && with_.top < box.bottom - 3) faults.push([told, other, svg.ariaLabel])
    })
  }
  return { faults, labels: shown.map(svg => svg.ariaLabel.split('.')[0]) }
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    found = [str(BUNDLED / "chromium")] if (BUNDLED / "chromium").exists() else []
    found += [path for path in map(shutil.which, NAMES) if path]
    if not found:
        pytest.skip(f"no Chromium: none in {BUNDLED}, none of {', '.join(NAMES)} on the PATH")
    libraries = f"{BUNDLED / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}" if BUNDLED.exists() else ""
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]  # root, and no graphics, in containers
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found[0], args=options, env={**os.environ, "LD_LIBRARY_PATH": libraries}
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for name, made in REPORTS.items():
        (folder / f"{name}.html").write_text(html_report.html(made()), "utf-8")
    return folder


@pytest.fixture
def opened(browser: Any, reports: Path) -> Iterator[Callable[..., tuple[Any, list[str]]]]:
    """Opens a report and gives the page, and a list of what it asked for and complained of."""
    pages = []

    def open_report(name: str, scheme: str = "light", width: int = 1440) -> tuple[Any, list[str]]:
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
        pages.append(page)
        told: list[str] = []
        page.on("console", lambda message: told.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.on("dialog", lambda dialog: told.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: told.append(f"request: {request.url}"))
        page.goto((reports / f"{name}.html").as_uri())
        return page, told

    yield open_report
    for page in pages:
        page.close()


def open_tables(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_readable_quiet_and_fits(opened: Any, reports: Path, name: str, scheme: str, width: int) -> None:
    page, told = opened(name, scheme, width)
    open_tables(page)
    assert told == [f"request: {(reports / f'{name}.html').as_uri()}"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrast = page.evaluate(CONTRAST)
    assert contrast["texts"] > 50
    assert contrast["low"] == []
    charts = page.evaluate(CHARTS)
    assert charts["faults"] == []
    # A dark page is dark: its stylesheet was taken.
    background = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(background) < 3 * 64) == (scheme == "dark")


def test_every_chart_is_there_once(opened: Any) -> None:
    for width in (360, 1440):
        page, _ = opened("everything", width=width)
        assert page.evaluate(CHARTS)["labels"] == [
            "Endpoint minus baseline, profile t5 (points)",
            "ROUGE, profile t5 (F x 100)",
            "Latency",
            "Latency over time",
            "Time to first token",
            "Throughput by load",
            "Latency by load",
        ]
    page, _ = opened("nothing completed")
    assert page.evaluate(CHARTS)["labels"] == []


def test_bars_are_as_high_as_their_counts(opened: Any) -> None:
    """By what is on the screen: each bar's height against the count that the table behind the chart has."""
    page, _ = opened("everything")
    open_tables(page)
    heights, counts = page.evaluate("""() => {
        const figure = [...document.querySelectorAll('figure')].find(e => e.querySelector('h3').innerText == 'Latency')
        const bars = [...figure.querySelectorAll('svg.wide rect.bar')].map(e => e.getBoundingClientRect().height)
        const cells = [...figure.querySelectorAll('tbody td')].map(e => Number(e.innerText.replaceAll(',', '')))
        return [bars, cells]
    }""")
    assert len(counts) > 5
    scale = max(heights) / max(counts)
    assert heights == pytest.approx([count * scale for count in counts], abs=0.5)


def test_print_shows_the_tables(opened: Any) -> None:
    page, _ = opened("two seconds", "dark")
    heights = "[...document.querySelectorAll('figure details table')].map(e => e.checkVisibility())"
    assert not any(page.evaluate(heights))
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 within Chromium's margins
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    inside = "[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)"
    assert page.evaluate(inside), "a table is cut"
    assert all(page.evaluate(heights))
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_hostile_texts_stay_text(opened: Any) -> None:
    page, _ = opened("hostile")
    assert page.evaluate("document.querySelectorAll('script, img, iframe, object, link, a, form, base').length") == 0
    assert page.evaluate("[...document.querySelectorAll('*')].every(e => ![...e.attributes].some("
                         "a => a.name.startsWith('on') || a.name == 'style'))")  # fmt: skip
    texts = page.evaluate("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert "</script><script>alert(1)</script>" in texts
    assert page.title() == '"><img src=x onerror=alert(1)> on <b>rows</b>'


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Any, scheme: str) -> None:
    script = BUNDLED / "axe.min.js"
    if not script.exists():
        pytest.skip(f"no axe-core: {script} is not there")
    page, _ = opened("everything", scheme)
    open_tables(page)
    page.evaluate(script.read_text("utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    assert [(each["id"], [node["html"][:100] for node in each["nodes"][:3]]) for each in found] == []
