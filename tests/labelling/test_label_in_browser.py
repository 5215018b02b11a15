"""The page for raters in headless Chromium: judge with mouse and keys, export, train on it."""

import random
import threading

import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from diffalign.data import open_pairs
from diffalign.evaluation import Manifest
from diffalign.jobs import label as job
from diffalign.jobs import votes as counted
from diffalign.labelling import Rankings, Votes
from diffalign.labelling.app import serve
from diffalign.labelling.rankings import list_tasks
from diffalign.labelling.store import pair_tasks
from diffalign.shapes.captions import parse
from diffalign.shapes.render import render
from tests import chromium

pytestmark = pytest.mark.browser
PROMPTS = [
    "a red circle on a blue background",
    "a green square on a white background",
    "a pink star on a gray background",
]
MODELS = ("base", "dpo", "mapo")


@pytest.fixture
def named(tmp_path):
    """Return name and pictures of three models, as the command finds them."""
    for shift, name in enumerate(MODELS):
        requested = pd.DataFrame({"prompt_id": range(3), "prompt": PROMPTS, "seed": 0})
        manifest = Manifest.plan(tmp_path / name, requested, settings={}, identity=name)
        for number, path in enumerate(manifest.paths):
            render(parse(PROMPTS[(number + shift) % 3]), random.Random(number)).save(path)
    return job.named_pictures(
        [str(tmp_path / name) for name in MODELS], tmp_path / "left_out.jsonl", Console(quiet=True)
    )


@pytest.fixture
def browse():
    """Return a function that serves a file of votes and opens its page as rater ann."""
    browser = chromium.start()

    def open_page(votes):
        found = []
        threading.Thread(target=serve, args=(votes,), kwargs={"port": 0, "announce": found.append}, daemon=True).start()
        (address,) = chromium.wait(lambda: found, "the server")
        browser.get(address)
        browser.find_element("name", "rater").send_keys("ann\n")
        wait_for(browser, 0)
        return browser

    yield open_page
    assert chromium.complaints(browser) == []
    browser.quit()


def wait_for(browser, done):
    """Wait until the page counts so many answers and shows all pictures of the next task."""
    script = """
        const seen = [...document.querySelectorAll(".pair img, .list img")].filter((i) => i.offsetParent);
        return document.getElementById("count").textContent.startsWith(arguments[0] + " of")
          && seen.every((i) => i.complete && i.naturalWidth > 0)"""
    chromium.wait(lambda: browser.execute_script(script, str(done)), f"{done} answers")


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def marked(browser):
    return browser.execute_script("return [...document.querySelectorAll('.chosen')].map((e) => e.dataset.choice)")


def test_a_telephone_stacks_the_pictures_and_zooms_both(browse, named, tmp_path):
    with Votes(tmp_path / "votes.sqlite") as votes:
        votes.add(pair_tasks(named[:2]))
        browser = browse(votes)
        assert "left is better" in browser.find_element("id", "pair-keys").text
        boxes = """return ["left", "right"].map((id) => document.getElementById(id).parentNode.getBoundingClientRect())
            .map((box) => [box.left, box.top, box.bottom])"""
        left, right = browser.execute_script(boxes)
        assert left[1] == right[1] < right[0]  # side by side
        for width in (768, 390):
            chromium.phone(browser, width)
            chromium.wait(lambda width=width: browser.execute_script("return innerWidth") == width, "the small screen")
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        left, right = browser.execute_script(boxes)
        assert left[0] == right[0]
        assert left[2] <= right[1]
        assert right[2] <= 844

        scale = "return ['left', 'right'].map((id) => getComputedStyle(document.getElementById(id)).transform)"
        assert set(browser.execute_script(scale)) == {"matrix(1, 0, 0, 1, 0, 0)"}
        browser.find_element("id", "zoom").click()
        assert set(browser.execute_script(scale)) == {"matrix(3, 0, 0, 3, 0, 0)"}
        press(browser, "z")
        assert set(browser.execute_script(scale)) == {"matrix(1, 0, 0, 1, 0, 0)"}
        pinch = """
            const button = document.querySelector("[data-choice=left]"), box = button.getBoundingClientRect();
            const send = (kind, id, x) => button.dispatchEvent(new PointerEvent(kind, { pointerId: id, bubbles: true,
                clientX: box.left + x, clientY: box.top + 50 }));
            send("pointerdown", 1, 100); send("pointerdown", 2, 150); send("pointermove", 2, 200); button.click();
            for (const id of [1, 2]) send("pointerup", id, 200);"""
        browser.execute_script(pinch)
        assert set(browser.execute_script(scale)) == {"matrix(2, 0, 0, 2, 0, 0)"}
        assert votes.table().empty  # fingers that zoomed have not voted


def test_judge_export_and_train(browse, named, diffalign, tiny_sdxl, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with Votes(tmp_path / "votes.sqlite") as votes:
        votes.add(pair_tasks(named[:2]))
        browser = browse(votes)
        press(browser, Keys.ARROW_LEFT)
        wait_for(browser, 1)
        press(browser, Keys.ARROW_DOWN)
        wait_for(browser, 2)
        press(browser, "u")
        chromium.wait(lambda: marked(browser) == ["tie"], "the old vote")
        press(browser, "u")
        chromium.wait(lambda: marked(browser) == ["left"], "the vote before it")
        press(browser, Keys.ENTER)
        chromium.wait(lambda: marked(browser) == [], "the next pair")
        assert votes.table()["credit"].tolist()[1] == 0.5  # kept
        press(browser, "u")
        chromium.wait(lambda: marked(browser) == ["tie"], "the old vote")
        browser.find_element("css selector", "[data-choice=right]").click()
        chromium.wait(lambda: marked(browser) == [], "the next pair")
        wait_for(browser, 2)
        press(browser, "1")
        wait_for(browser, 3)
        assert browser.find_element("id", "prompt").text == "All done. Thank you."
        table = votes.table()
        assert len(table) == 3
        # The first and the last choice were the left picture, the second the right one.
        assert ((table["credit"] == 1) == (table["left"] == "a")).tolist() == [True, False, True]
        assert (table["seconds"] > 0).all()
    assert counted.export(votes.file, tmp_path / "human" / "train.parquet", "majority", Console(quiet=True)) == 3
    (tmp_path / "run.yaml").write_text(
        f"model: {{pretrained_model_name_or_path: {tiny_sdxl}}}\n"
        f"lora: {{rank: 2}}\n"
        f"data: {{train_data_dir: {tmp_path / 'human'}, resolution: 64, cache_dir: {tmp_path / 'cache'}}}\n"
        f"objective: {{name: dpo}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, train_batch_size: 2, max_train_steps: 1}}\n"
        "logging: {report_to: []}\n"
    )
    code, said = diffalign("train", tmp_path / "run.yaml")
    assert code == 0, said
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()


def test_rank_three_pictures(browse, named, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with Rankings(tmp_path / "votes.sqlite", counted.propose) as rankings:
        rankings.add(list_tasks(named, 3))
        browser = browse(rankings)
        first = rankings.next_task("ann")
        press(browser, "2", "3")  # the one left is the last
        assert [x.text for x in browser.find_elements("css selector", ".list .place")] == ["#3", "#1", "#2"]
        press(browser, Keys.ENTER)
        wait_for(browser, 1)
        browser.find_elements("css selector", ".list button")[0].click()
        press(browser, "=", "2", "3", Keys.ENTER)
        wait_for(browser, 2)
        press(browser, "u")
        places = "return [...document.querySelectorAll('.list .place')].map((e) => e.textContent).sort()"
        chromium.wait(lambda: browser.execute_script(places) == ["#1", "#1", "#3"], "the old ranking")
        press(browser, Keys.ENTER)
        chromium.wait(lambda: browser.execute_script(places) == ["", "", ""], "the next list")
        wait_for(browser, 2)
        chromium.phone(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        table = rankings.table().set_index("task")
        at_places = [table.loc[first, "ranks"][model] for model in rankings.places(first, "ann")]
        assert at_places == [3, 1, 2]
        assert sorted(table.drop(first)["ranks"].iloc[0]) == [1, 1, 3]
    counted.export(rankings.file, tmp_path / "lists" / "train.parquet", "lists", Console(quiet=True))
    exported = open_pairs(tmp_path / "lists")
    assert exported.images_per_example == 3
    by_task = dict(zip(sorted([first, *table.drop(first).index]), exported, strict=True))
    with Rankings(rankings.file) as again, Image.open(again.file_of(first, "ann", 1)) as best:
        assert by_task[first].images[0].load().tobytes() == best.tobytes()
