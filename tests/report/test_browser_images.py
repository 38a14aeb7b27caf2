# SPDX-License-Identifier: Apache-2.0
"""What a page's script does, in headless Chromium: images that open, the table of all images, charts, print."""

import base64
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_helpers import headings_at_the_foot, job, needs_browser, needs_pdftotext, report, show

from anomalib_flowood.benchmark import Results
from anomalib_flowood.report.maps import Kept

pytestmark = needs_browser

NAMES = ["=HYPERLINK(1)", 'a"b,c', "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "ümlaut"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 images of three sets, with names that mean harm, maps, masks and a threshold."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows, maps = [], {}
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    for number in range(120):
        source = ["good", "hole", "=scratch"][number % 3]
        path = root / f"{number}{NAMES[number % 5].replace('/', '-')}.png"
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
        rows.append({"image_path": str(path), "source": source, "label": int(number % 3 > 0)})
        maps[str(path)] = Kept(rng.random((8, 8)).astype(np.float16), mask if number % 3 else None)
    samples = pd.DataFrame(rows)
    (root / "run").mkdir()
    results = Results(root / "run")
    for detector in ("one", "other"):
        row = {"detector": detector, "data": "<b>parts</b>", "seed": 0}
        row, scores = job(row, samples.assign(score=rng.normal(size=120) + 2 * samples["label"]))
        results.add({**row, "threshold": 1.0, "alpha": 0.05, "level": 0.04}, scores, maps)
    report(root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report" / "index.html").as_uri()


def press(browser, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def rows_of(browser) -> list[list[str]]:
    cells = "[...row.cells].map(cell => cell.textContent)"
    return browser.execute_script(f"return [...document.querySelectorAll('.images tbody tr')].map(row => {cells})")


def choose(browser, place: int, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(browser.find_elements("css selector", ".images select")[place]).select_by_visible_text(value)


def saved(browser) -> pd.DataFrame:
    """What the button saves, as it is written."""
    for old in browser.downloads.glob("*"):
        old.unlink()
    browser.execute_script(
        "[...document.querySelectorAll('.images button')].find(b => b.textContent.includes('CSV')).focus()"
    )
    press(browser, " ")
    for _ in range(100):
        if list(browser.downloads.glob("*.csv")):
            break
        time.sleep(0.05)
    return pd.read_csv(next(browser.downloads.glob("*.csv")))


def test_the_table_of_images_is_searched_filtered_and_saved(browser, page: str, folder: Path) -> None:
    scores = pd.read_csv(folder / "scores.csv")
    show(browser, page)
    one = scores[scores["detector"] == "one"].sort_values("score", ascending=False, kind="stable")
    shown = rows_of(browser)
    assert len(shown) == 50
    assert [float(row[3].replace("−", "-")) for row in shown] == pytest.approx(one["score"][:50].tolist(), rel=1e-4)
    assert "1–50 of 120" in browser.find_element("css selector", ".images [role=status]").text

    # As a file: all rows, on this page or not, with the names as the run's own tables have them.
    table = saved(browser)
    assert table["image_path"].tolist() == one["image_path"].tolist()
    assert table["source"].tolist() == one["source"].tolist()
    assert set(table["source"]) == {"good", "hole", "'=scratch"}
    assert table["score"].tolist() == one["score"].tolist()
    expected = np.where(one["label"] == 1, np.where(one["score"] > 1, "found", "missed"),
                        np.where(one["score"] > 1, "false alarm", "no alarm"))  # fmt: skip
    assert table["outcome"].tolist() == expected.tolist()

    # Filtered, of the other detector, sorted by name; what is saved is what is shown.
    choose(browser, 0, "other")
    choose(browser, 1, "hole")
    choose(browser, 2, "missed")
    browser.find_element("css selector", ".images input[type=search]").send_keys("SCRIPT")
    browser.find_element("css selector", ".images thead button").click()
    other = scores[scores["detector"] == "other"]
    wanted = other[(other["source"] == "hole") & (other["score"] <= 1) & other["image_path"].str.contains("script")]
    assert 0 < len(wanted) < 40
    assert saved(browser)["image_path"].tolist() == sorted(wanted["image_path"])
    shown = rows_of(browser)
    assert [row[0] for row in shown] == sorted(Path(path).name for path in wanted["image_path"])
    assert {row[4] for row in shown} == {"missed"}
    assert not browser.find_elements("css selector", ".images img, .images tbody script")
    browser.find_element("css selector", ".images input[type=search]").send_keys("no such name")
    assert rows_of(browser) == []
    assert "0–0 of 0" in browser.find_element("css selector", ".images [role=status]").text


def test_infinite_scores_are_the_most_anomalous(browser, tmp_path: Path) -> None:
    """A detector gives them to images that have no density."""
    label = np.arange(30) % 3 > 0
    source = np.array(["good", "hole", "scratch"])[np.arange(30) % 3]
    score = np.where(source == "hole", np.inf, np.random.default_rng(0).normal(size=30) + 2 * label)
    samples = pd.DataFrame({"image_path": [f"{n}.png" for n in range(30)], "source": source, "label": label + 0})
    row, scores = job({"detector": "one", "data": "parts", "seed": 0}, samples.assign(score=score))
    Results(tmp_path).add({**row, "threshold": 1.0, "alpha": 0.05, "level": 0.04}, scores)
    show(browser, report(tmp_path).as_uri())
    shown = rows_of(browser)
    assert [row[1:] for row in shown[:10]] == [["hole", "outside", "Infinity", "found"]] * 10
    assert [float(row[3].replace("−", "-")) for row in shown] == pytest.approx(sorted(score, reverse=True), rel=1e-4)
    assert saved(browser)["score"].tolist() == sorted(score, reverse=True)
    kinds = "[...[...document.querySelectorAll('table.sortable')].at(-1).tBodies[0].rows]"
    *_, median = browser.find_elements("css selector", "table.sortable thead button")
    for expected in (["scratch", "hole"], ["hole", "scratch"]):
        browser.execute_script("arguments[0].click()", median)
        assert browser.execute_script(f"return {kinds}.map(row => row.cells[1].textContent)") == expected


def test_images_open_by_keyboard(browser, page: str) -> None:
    from selenium.webdriver.common.keys import Keys

    show(browser, page)
    focus = "document.querySelector('.tiles .open')"
    browser.execute_script(f"{focus}.focus({{ focusVisible: true }})")
    assert browser.execute_script(f"return getComputedStyle({focus}).outlineStyle") == "solid"
    press(browser, Keys.ENTER)
    opened = "return [document.getElementById('viewer').open, document.querySelector('#viewer p')?.textContent]"
    is_open, text = browser.execute_script(opened)
    assert is_open
    name = browser.execute_script("return document.querySelector('.tiles .tile').getAttribute('aria-label')")
    assert text.startswith(name)
    # The image as it is, and the same below its map.
    layers = "return [...document.querySelectorAll('#viewer svg')].map(svg => svg.querySelectorAll('.map').length)"
    assert browser.execute_script(layers) == [0, 1]
    press(browser, Keys.ARROW_RIGHT)
    assert browser.execute_script(opened)[1] != text
    press(browser, Keys.ARROW_LEFT)
    assert browser.execute_script(opened)[1] == text
    press(browser, Keys.ESCAPE)
    assert not browser.execute_script(opened)[0]
    assert browser.execute_script(f"return document.activeElement === {focus}")
    # Maps and outlines are taken off by keyboard, too.
    seen = "return getComputedStyle(document.querySelector('.tiles .map')).display"
    assert browser.execute_script(seen) == "inline"
    browser.execute_script("document.querySelector('.layer-maps').focus()")
    press(browser, " ")
    assert browser.execute_script(seen) == "none"


def test_everything_that_is_clicked_has_a_key(browser, page: str) -> None:
    show(browser, page)
    named = """
        const able = "a[href], button, input, select, summary, [tabindex]";
        return [...document.querySelectorAll(able)].filter(element => element.tabIndex < 0
            || !(element.textContent.trim() || element.labels?.length || element.getAttribute("aria-label")
                || element.querySelector("[aria-label]"))).map(element => element.outerHTML.slice(0, 200));
    """
    assert browser.execute_script(named) == []
    handlers = "return document.querySelectorAll('[onclick]').length"
    assert browser.execute_script(handlers) == 0


def test_charts_can_be_explored_without_a_mouse(browser, page: str) -> None:
    show(browser, page)
    browser.execute_script("document.querySelector('.chart').scrollIntoView()")
    for _ in range(100):
        if browser.find_elements("css selector", ".chart .vega-embed svg"):
            break
        time.sleep(0.05)
    chart = browser.find_element("css selector", ".chart")
    assert len(chart.find_elements("css selector", "svg")) == 1  # in the place of the drawing
    lines = "[...document.querySelector('.chart').querySelectorAll('.mark-line path')]"
    faded = f"return {lines}.map(line => line.getAttribute('opacity'))"
    before = browser.execute_script(faded)
    choice = chart.find_element("css selector", "select")
    choice.send_keys("other")
    time.sleep(0.2)
    after = browser.execute_script(faded)
    assert before != after
    assert "0.12" in after
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_printed_page_has_everything(browser, page: str) -> None:
    show(browser, page)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    # Folded parts were open while it was printed, and are folded again.
    seen = browser.execute_script("""
        dispatchEvent(new Event("beforeprint"));
        const open = [...document.querySelectorAll("details")].every((details) => details.open);
        dispatchEvent(new Event("afterprint"));
        return [open, document.querySelectorAll("details:not([open])").length];
    """)
    assert seen[0]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        hidden = """return ["nav", ".controls", ".images .bar"].map(
            (name) => getComputedStyle(document.querySelector(name)).display);"""
        assert browser.execute_script(hidden) == ["none"] * 3
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@needs_pdftotext
def test_no_heading_is_printed_apart_from_what_it_heads(browser, page: str) -> None:
    assert headings_at_the_foot(browser, page, (6.0, 7.3, 8.6, 9.9, 11.2)) == []


def test_no_text_of_a_chart_touches_another(browser, page: str) -> None:
    """In drawings whose fonts are the reader's: they are printed where nobody has scrolled to them."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, page)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    found = browser.execute_script("""
        for (const folded of document.querySelectorAll("details")) folded.open = true;
        const meet = (a, b) => a.left < b.right + 3 && b.left < a.right + 3 && a.top < b.bottom && b.top < a.bottom;
        const still = [...document.querySelectorAll(".chart > svg")];
        const pairs = still.flatMap((svg) => {
          const texts = [...svg.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
          return texts.flatMap(([one, a], place) =>
            texts.slice(place + 1).filter(([, b]) => meet(a, b)).map(([other]) => [one, other]));
        });
        return [still.length, pairs];
    """)
    assert found[0] > 0
    assert found[1] == []


def test_ten_thousand_images_stay_usable(browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count = 10_000
    paths = [f"/data/factory/line 3/test/{number:06d}.png" for number in range(count)]
    samples = pd.DataFrame(
        {"image_path": paths, "source": ["good", "scratch"] * (count // 2), "label": [0, 1] * (count // 2)}
    )
    folder = tmp_path / "run"
    folder.mkdir()
    row = {"detector": "d", "data": "parts", "seed": 0}
    Results(folder).add(*job(row, samples.assign(score=rng.normal(size=count))))
    page = report(folder)
    assert page.stat().st_size < 1_700_000  # of which the charts' library is 0.9 MB
    start = time.perf_counter()
    show(browser, page.as_uri())
    assert len(rows_of(browser)) == 50
    browser.find_element("css selector", ".images input[type=search]").send_keys("00123")
    wanted = sum("00123" in path for path in paths)
    assert len(rows_of(browser)) == wanted == 11
    assert time.perf_counter() - start < 20
    assert len(saved(browser)) == wanted
    assert browser.execute_script("return document.querySelectorAll('*').length") < 5_000
