"""The interactive page in a real browser: for the tests of its numbers and of its controls."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

PREBUILT = Path(__file__).parents[2] / "docs" / "playground.html"
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND"),
]
DEFAULTS = {
    **{"g": 0.5, "m2": 6, "s2": 0.25, "progress": 0.5, "path": "sde", "seed": 11},
    **{"gate": 0.05, "bands": 6, "exponent": 3, "s1": 30, "steps": 50, "sampler": "ddim"},
}
CHARTS = ["potential", "coupling", "replicas", "modes", "squares", "bands", "gaps", "shares"]
SPLIT = CHARTS[:5]  # of the first half; the second half shows the bands


def missing(reason) -> NoReturn:
    """Skips, or fails where a browser is required."""
    if os.environ.get("SYNCGAP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"SYNCGAP_REQUIRE_BROWSER is set, but {reason}", pytrace=False)
    pytest.skip(f"the page is tested in a browser, and {reason}")


@contextmanager
def running_browser(profile: Path):
    """A browser without a network, its profile in this folder. Where none is installed, see `missing`."""
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None:
        missing(f"none of {', '.join(BROWSERS)} is installed")
    if driver is None:
        missing("chromedriver, which belongs to the browser, is not installed")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing("selenium is not installed: pip install 'syncgap[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        running.execute_cdp_cmd("Network.enable", {})
        running.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*", "ws://*", "wss://*"]})
        yield running
    finally:
        running.quit()


def screen(browser, width, height, scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def settle(browser):
    """Waits until what changed is drawn."""
    wait = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)))"
    browser.execute_async_script(wait)


def opened(browser, hash_=""):
    browser.get("about:blank")  # else only the hash would change
    browser.get(PREBUILT.as_uri() + hash_)
    settle(browser)


def call(page, expression, *arguments):
    """Value of a JavaScript expression, NaN and infinities as null."""
    return json.loads(page.execute_script(f"return JSON.stringify({expression})", *arguments))


def plain(value):
    """Nested lists as an array, null as NaN."""
    return np.array(value, np.float64)


def canvases(page):
    """What each chart shows, as an encoded image."""
    script = "return arguments[0].map(name => document.querySelector(`#chart-${name} canvas`).toDataURL())"
    return dict(zip(CHARTS, page.execute_script(script, CHARTS), strict=True))
