# SPDX-License-Identifier: Apache-2.0
"""Chromium, without a window."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_helpers import BROWSER, DRIVER


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    arguments = ["headless", "disable-gpu", "no-first-run", "disable-background-networking", "disable-quic"]
    arguments += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"]
    if os.geteuid() == 0:  # Chromium's sandbox does not work for root
        arguments.append("no-sandbox")
    for argument in arguments:
        options.add_argument(f"--{argument}")
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.downloads = Path(downloads)
    yield driver
    driver.quit()
