"""A headless Chromium for tests of pages; they are skipped where there is none."""

import shutil
import time

import pytest

ERRORS = ("SEVERE",)


def find() -> tuple[str, str]:
    """Return the browser and its driver; skip the test without them or without selenium."""
    pytest.importorskip("selenium")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium and chromedriver")
    return browser, driver


def start(width: int = 1200, height: int = 900):
    """Return a driver of a new browser; the caller quits it."""
    browser, driver = find()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def phone(browser, width: int = 390, height: int = 844) -> None:
    """Make the browser a telephone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def complaints(browser) -> list[str]:
    """Return what the console has said since it was last asked, of errors."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ERRORS]


def wait(condition, what: str, seconds: float = 20.0):
    """Return what `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"Waited {seconds:g} s for {what}.")
