# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium, as Debian packages it."""

import json
import shutil

import pytest
from report_helpers import DETECTORS, contrast, in_memory, luminance, needs_browser, report, samples_of, show, write_run

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report's address; its folder has nothing but the page."""
    root = tmp_path_factory.mktemp("browser")
    entry = in_memory(root)
    data = {"FashionMNIST → shapes with a long name": samples_of(entry), "other": samples_of(entry)}
    folder = write_run(root / "run", data, entries=dict.fromkeys(data, entry), failed=("poor one",))
    alone = root / "alone"
    alone.mkdir()
    return shutil.copy(report(folder), alone / "index.html").as_uri()


def test_nothing_is_fetched_and_nothing_fails(browser, page: str) -> None:
    browser.get("about:blank")
    for log in ("performance", "browser"):  # of pages before
        browser.get_log(log)
    show(browser, page)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {sent["params"]["request"]["url"] for sent in messages if sent["method"] == "Network.requestWillBeSent"}
    assert page in asked
    assert {address.partition(":")[0] for address in asked} <= {"file", "data"}
    assert {address for address in asked if address.startswith("file:")} == {page}
    # Images are in the page once each, and all of them are drawn.
    broken = """
        return Promise.all([...document.querySelectorAll('image')].map(({ href }) => {
            const image = new Image();
            image.src = href.baseVal;
            return image.decode().then(() => 0, () => 1);
        })).then((failed) => failed.reduce((a, b) => a + b, 0));
    """
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.querySelectorAll('.tiles .tile').length") == 2 * 2 * 3 * 8
    for identifier in browser.execute_script(
        "return [...document.querySelectorAll('use')].map(use => use.href.baseVal)"
    ):
        assert browser.find_elements("css selector", identifier)


def test_the_table_is_sorted_by_keyboard(browser, page: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> None:
        ActionChains(browser).send_keys(key).perform()

    show(browser, page)
    names = (
        "return [...document.querySelector('table').tBodies[0].rows].map(row => row.cells[0].firstChild.data.trim())"
    )
    focused = "return document.activeElement.textContent"
    original = browser.execute_script(names)
    assert original == [*DETECTORS, *DETECTORS]
    for _ in range(50):
        press(Keys.TAB)
        if browser.execute_script(focused).startswith("AUROC"):
            break
    assert browser.execute_script("return document.activeElement.tagName") == "BUTTON"
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # one sees where the keyboard is

    value = "return [...document.querySelector('table').tBodies[0].rows].map(row => row.cells[2].dataset.value ?? null)"
    sort = "return document.activeElement.closest('th').getAttribute('aria-sort')"
    press(Keys.ENTER)
    assert browser.execute_script(sort) == "descending"  # the best AUROC is the highest
    numbers = [float(number) for number in browser.execute_script(value)[:4]]
    assert numbers == sorted(numbers, reverse=True)
    assert browser.execute_script(value)[4:] == [None, None]  # the failed jobs
    press(Keys.SPACE)
    assert browser.execute_script(sort) == "ascending"
    numbers = [float(number) for number in browser.execute_script(value)[:4]]
    assert numbers == sorted(numbers)
    assert browser.execute_script(value)[4:] == [None, None]

    for _ in range(2):
        ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert browser.execute_script(focused).startswith("detector")
    press(Keys.ENTER)
    assert browser.execute_script(names) == sorted(original)
    assert (
        len(browser.execute_script("return [...document.querySelectorAll('table')[0].querySelectorAll('[aria-sort]')]"))
        == 1
    )


def test_a_long_name_in_a_list_does_not_widen_a_narrow_page(browser, tmp_path) -> None:
    detectors = {f"{name}, {'with many words ' * 5}": distance for name, distance in DETECTORS.items()}
    entry = in_memory(tmp_path)
    data = {"shapes": samples_of(entry)}
    folder = write_run(tmp_path / "run", data, detectors=detectors, entries={"shapes": entry})
    show(browser, report(folder).as_uri(), 360)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("width", [320, 360, 1280])
def test_the_page_never_scrolls_sideways(browser, page: str, width: int) -> None:
    show(browser, page, width)
    browser.execute_script("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # Every picture fits, and is large enough to be read.
    widths = browser.execute_script("return [...document.querySelectorAll('.chart svg')].map(svg => svg.clientWidth)")
    assert min(widths) > 250
    assert max(widths) <= width
    if width < 500:  # what is wider than the page scrolls in its own box, by keyboard too
        boxes = "[...document.querySelectorAll('.wide')].map(box => [box.scrollWidth > box.clientWidth, box.tabIndex])"
        assert [True, 0] in browser.execute_script(f"return {boxes}")


def test_the_dark_page_can_be_read(browser, page: str) -> None:
    seen = """
        const probe = document.createElement('i');
        probe.style.color = 'Canvas';
        document.body.append(probe);
        const of = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
        const line = document.querySelector('svg path[stroke*="--blue"]');
        return [getComputedStyle(probe).color, of('p', 'color'), of('svg text', 'fill'), of('.failed', 'color'),
            getComputedStyle(line).stroke];
    """
    found = {}
    for scheme in ("light", "dark"):
        show(browser, page, scheme=scheme)
        found[scheme] = browser.execute_script(seen)
        ground, *colours = found[scheme]
        assert min(contrast(ground, colour) for colour in colours) > 4.5
    assert luminance(found["light"][0]) > 0.9
    assert luminance(found["dark"][0]) < 0.02
    assert all(light != dark for light, dark in zip(found["light"], found["dark"], strict=True))


def test_without_scripts_the_table_is_a_table(browser, page: str) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, page)
        headings = [head.text for head in browser.find_elements("css selector", "thead th")]
        buttons = browser.find_elements("css selector", "button")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert headings[:3] == ["detector", "data", "AUROC ↑"]
    assert buttons == []
