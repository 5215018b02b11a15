"""The report in headless Chromium, with 500 prompts: no errors, filters, slider, keys, telephone."""

import numpy as np
import pandas as pd
import pytest

from diffalign.evaluation import Evaluation, write_report
from tests import chromium
from tests.evaluation.toy import painted

pytestmark = pytest.mark.browser
COUNT = 500
SECONDS = 1.0  # for a filter; measured 0.03 s on an idle machine


@pytest.fixture(scope="module")
def differences():
    return np.random.default_rng(0).normal(0.02, 0.1, COUNT).round(3)


@pytest.fixture(scope="module")
def page(tmp_path_factory, differences):
    """Return the report of 500 prompts of two categories."""
    ids = range(COUNT)
    common = {"prompt_id": ids, "prompt": [f"prompt {i}" for i in ids], "seed": 0, "scorer": "oracle"}
    base = pd.DataFrame({**common, "model": "base", "score": 0.5})
    dpo = pd.DataFrame({**common, "model": "dpo", "score": 0.5 + differences})
    categories = pd.DataFrame({"prompt_id": ids, "style": ["photo" if i % 5 == 0 else "anime" for i in ids]})
    evaluation = Evaluation(scores=pd.concat([base, dpo]), baseline="base", categories=categories)
    pictures = [painted(60 + 10 * i, 64, i) for i in range(8)]
    images = {m: {(i, 0): pictures[(i + shift) % 8] for i in ids} for m, shift in (("base", 0), ("dpo", 1))}
    options = {"evaluation": evaluation, "gallery_size": COUNT, "command": "diffalign evaluate"}
    return write_report(
        tmp_path_factory.mktemp("page") / "report.html", evaluation.comparisons["dpo"], images, **options
    )


@pytest.fixture
def browser(page):
    browser = chromium.start()
    browser.get(page.as_uri())
    yield browser
    assert chromium.complaints(browser) == []
    browser.quit()


def shown(browser):
    """Return the prompts that are visible, in their order on the page."""
    script = "return [...document.querySelectorAll('article:not([hidden])')].map((a) => Number(a.dataset.prompt))"
    return browser.execute_script(script)


def choose(browser, name, value):
    """Set a control of the toolbar and return how many seconds the page took to be painted again."""
    return browser.execute_async_script(
        """
        const [name, value, done] = arguments, begin = performance.now();
        const control = document.querySelector(`.toolbar [name=${name}], .toolbar [type=${name}]`);
        if (control) {
          control.value = value;
          control.dispatchEvent(new Event(name === "search" ? "input" : "change"));
        } else document.querySelector(`[data-${name}=${value}]`).click();
        requestAnimationFrame(() => setTimeout(() => done((performance.now() - begin) / 1000)));
        """,
        name,
        value,
    )


def test_filters_and_orders_of_five_hundred_prompts(browser, differences):
    best_first = np.argsort(-differences, kind="stable")
    assert differences[shown(browser)].tolist() == differences[best_first].tolist()
    took = [choose(browser, "show", "loss")]
    assert set(shown(browser)) == set(np.flatnonzero(differences < 0))
    took.append(choose(browser, "order", "losses"))
    assert shown(browser)[0] == differences.argmin()
    took.append(choose(browser, "category", "photo"))
    assert set(shown(browser)) == {i for i in np.flatnonzero(differences < 0) if i % 5 == 0}
    took += [choose(browser, "show", "all"), choose(browser, "category", ""), choose(browser, "search", "prompt 49")]
    assert set(shown(browser)) == {49, *range(490, 500)}
    took += [choose(browser, "search", ""), choose(browser, "order", "size")]
    assert len(shown(browser)) == COUNT
    assert abs(differences[shown(browser)[0]]) == abs(differences).max()
    assert max(took) < SECONDS, took


def test_slider_and_keys(browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def prompt():
        return browser.find_element(By.CSS_SELECTOR, "dialog .prompt").text

    def press(*keys):
        ActionChains(browser).send_keys(*keys).perform()

    browser.find_element(By.CSS_SELECTOR, "article .open").click()
    first = prompt()
    press(Keys.ARROW_RIGHT)
    assert prompt() != first
    press(Keys.ARROW_LEFT)
    assert prompt() == first

    width = "return document.querySelector('.stage').getBoundingClientRect()"
    clip = "return getComputedStyle(document.querySelector('.stage figure img')).clipPath"
    assert browser.execute_script(clip) == "none"
    press("s")
    boxes = browser.execute_script("return [...document.querySelectorAll('.stage img')].map((i) => i.offsetLeft)")
    assert boxes[0] == boxes[1]  # one over the other
    middle = browser.execute_script(clip)
    press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.execute_script(clip) != middle
    assert prompt() == first  # the arrows moved the slider, not the pair
    stage = browser.execute_script(width)
    place = browser.find_element(By.CLASS_NAME, "stage")
    quarter = round(stage["width"] / 4)
    ActionChains(browser).move_to_element(place).click_and_hold().move_by_offset(-quarter, 0).release().perform()
    assert float(browser.execute_script("return document.querySelector('.divide').value")) == pytest.approx(25, abs=1)
    press(Keys.ESCAPE)
    assert not browser.execute_script("return document.querySelector('dialog').open")


def test_a_telephone_shows_it_without_scrolling_sideways(browser):
    chromium.phone(browser)
    widths = "return [document.documentElement.scrollWidth, innerWidth]"
    chromium.wait(lambda: browser.execute_script(widths)[1] == 390, "the telephone")
    assert browser.execute_script(widths) == [390, 390]
    small = (
        "return [...document.querySelectorAll('main p, main td, main th, main dd')].filter((e) => e.offsetParent && "
    )
    assert browser.execute_script(small + "parseFloat(getComputedStyle(e).fontSize) < 11).length") == 0
