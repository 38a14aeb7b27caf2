# SPDX-License-Identifier: Apache-2.0
"""The page of an explanation in headless Chromium: on a phone, in the dark."""

import pytest
import torch
from model_helpers import feature_map_flow
from report_helpers import contrast, headings_at_the_foot, luminance, needs_browser, needs_pdftotext, show

from anomalib_flowood.explain import explain

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an explanation with single images."""
    torch.manual_seed(0)
    detector = feature_map_flow(coupling_layers=0)
    images = torch.rand(24, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = detector.model.extract(detector.pre_processor.transform(images))
        detector.model.fit_features(maps)
        detector.model.fit_whitening(detector.model.prepare(maps))
    detector.model.fitted.fill_(True)
    sets = {"parts with a very long name of their set": images[:6], "holes": images[6:12] * 0.4}
    return explain(detector.eval(), sets, tmp_path_factory.mktemp("explained")).as_uri()


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_cropped(browser, page: str, width: int) -> None:
    show(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    beyond = """
        return [...document.querySelectorAll("img, svg, .bars li, h3, .card p")].filter((element) => {
            const { left, right } = element.getBoundingClientRect();
            return left < 0 || right > innerWidth;
        }).map((element) => element.outerHTML.slice(0, 80));
    """
    assert browser.execute_script(beyond) == []
    assert browser.execute_script("return document.querySelectorAll('.case').length") == 6
    # A table that is wider than a phone scrolls in its own box, by keyboard too.
    box = "const box = document.querySelector('.wide'); return [box.scrollWidth - box.clientWidth, box.tabIndex]"
    wider, tab = browser.execute_script(box)
    assert wider <= 0 or width < 390
    assert tab == 0


def test_the_page_is_dark_where_the_system_is(browser, page: str) -> None:
    seen = """
        const of = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
        return [of("body", "backgroundColor"), of(".card", "backgroundColor"), of("p", "color"),
            of("figcaption", "color"), of(".tiles li", "color"), document.querySelector("img").currentSrc];
    """
    for scheme in ("light", "dark"):
        show(browser, page, scheme=scheme)
        ground, card, *colours, picture = browser.execute_script(seen)
        assert min(contrast(card, colour) for colour in colours) > 4.5
        assert (luminance(ground) < 0.05) == (luminance(card) < 0.05) == (scheme == "dark")
        assert ("/dark/" in picture) == (scheme == "dark")
    broken = "return [...document.images].filter(image => !image.complete || image.naturalWidth === 0).length"
    assert browser.execute_script(broken) == 0
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@needs_pdftotext
def test_no_heading_is_printed_apart_from_what_it_heads(browser, page: str) -> None:
    assert headings_at_the_foot(browser, page, (4.0, 4.6, 5.2, 7.3, 9.9)) == []
