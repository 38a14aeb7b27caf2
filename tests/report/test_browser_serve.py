# SPDX-License-Identifier: Apache-2.0
"""The page of ``flowood serve`` in headless Chromium, with a server behind it."""

import threading
import time

import numpy as np
import pytest
import uvicorn
from PIL import Image
from report_helpers import BROWSER, DRIVER, show

from anomalib_flowood.inference import Detector
from anomalib_flowood.models.components.export_check import Runtime
from anomalib_flowood.serving.app import create_app

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs chromium and chromedriver; on Debian, as root: apt-get install chromium chromium-driver",
)


@pytest.fixture
def address():
    """A server whose score is the mean of the image, and whose map is its red channel."""

    def run(images):
        return {"pred_score": images.mean((1, 2, 3)), "anomaly_map": images[:, 0]}

    app = create_app(Detector(Runtime(run), (8, 8), list(np.linspace(0.1, 0.4, 20)), 1 / 21))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (320, "dark")])
def test_images_are_chosen_by_keyboard_scored_and_shown(width, scheme, browser, address, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait

    for name, colour in (("good & <b>.png", (40, 40, 40)), ("bad.png", (250, 250, 250))):
        Image.new("RGB", (30, 20), colour).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"none")
    browser.get_log("performance")
    show(browser, address, width, scheme)
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.execute_script("return document.activeElement.id") == "files"
    assert browser.execute_script("return getComputedStyle(document.querySelector('.drop')).outlineStyle") == "solid"
    browser.switch_to.active_element.send_keys("\n".join(str(path) for path in sorted(tmp_path.iterdir())))
    summary = browser.find_element("id", "summary")
    WebDriverWait(browser, 20).until(lambda _: summary.text == "1 anomalous, 1 normal, 1 not scored")
    found = {
        card.find_element("css selector", "span").text: card for card in browser.find_elements("css selector", "li")
    }
    assert set(found) == {"good & <b>.png", "bad.png", "broken.png"}
    assert "p-value\n0.04762" in found["bad.png"].text
    assert "Cannot read the image" in found["broken.png"].text
    marked = "return getComputedStyle(arguments[0]).borderTopWidth"
    assert browser.execute_script(marked, found["bad.png"]) == "4px"
    assert browser.execute_script(marked, found["good & <b>.png"]) == "1px"
    painted = "return arguments[0].querySelector('canvas').getContext('2d').getImageData(4, 4, 1, 1).data[3]"
    WebDriverWait(browser, 20).until(lambda _: found["bad.png"].find_elements("css selector", "canvas"))
    assert browser.execute_script(painted, found["bad.png"]) > 100
    assert browser.execute_script(painted, found["good & <b>.png"]) == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.find_element("id", "clear").send_keys(Keys.ENTER)
    assert (summary.text, browser.find_elements("css selector", "li")) == ("No images yet.", [])
