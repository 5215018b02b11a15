"""The report stands alone, is safe to open, and shows the numbers of the comparison."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import DataError, UserError
from diffalign.evaluation import write_report
from diffalign.evaluation.curves import read_metrics, training_charts
from diffalign.evaluation.gallery import choose_pairs, picture
from diffalign.webpages.plots import running_mean, thin
from tests.evaluation.toy import PROMPTS

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Collect the elements of a page, check that they nest, and gather its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def metrics(tmp_path):
    lines = [
        {"step": step, "loss": 0.69 - step / 1000, "implicit_accuracy": 0.5 + step / 400, "learning_rate": 1e-5}
        | {"chosen_drift": step * 1e-6, "rejected_drift": step * 3e-6, "note": "text"}
        for step in range(1, 60)
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file


@pytest.fixture
def full(tmp_path, comparison, images, metrics):
    config = {"objective": {"name": "dpo", "beta": 2000.0}, "out": tmp_path}
    command = "diffalign evaluate --prompts 'a <b>.txt'"
    return write_report(tmp_path / "report.html", comparison, images, metrics=metrics, config=config, command=command)


def test_it_needs_nothing_else(full):
    text = full.read_text()
    page = Page(text)
    assert not page.all("link")
    sources = [attributes["src"] for tag, attributes in page.elements if "src" in attributes]
    assert len(sources) == 10 + 10  # the examples under the verdict, and the gallery
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|url\((?!#)", re.sub(r"data:image/[^\"]*", "", text))


def test_prompts_cannot_inject_markup(full):
    page = Page(full.read_text())
    assert PROMPTS[3] in page.text
    assert len(page.all("script")) == 1
    assert "alert" not in full.read_text().split("<script>")[-1]
    assert "a <b>.txt" in page.text


def test_numbers_and_words(full, comparison):
    text = " ".join(Page(full.read_text()).text.split())
    result = comparison.results["brightness"]
    assert comparison.describe("brightness") in text
    assert "70.0%" in text
    assert f"{100 * result.ci_low:.1f}% to {100 * result.ci_high:.1f}%" in text
    assert "3 / 1 / 1" in text
    for words in ("percentile bootstrap over prompts", "exactly equal scores count as half a win", "sign test"):
        assert words in text
    for words in ("beta: 2000.0", "scheduler.class", "EulerDiscreteScheduler", "Implicit accuracy", "Drift"):
        assert words in text


def test_cards_carry_what_the_script_sorts_by(full, comparison):
    cards = Page(full.read_text()).all("article")
    assert [int(card["data-prompt"]) for card in cards] == [0, 1, 4, 2, 3]
    scores = json.loads(cards[0]["data-scores"])
    row = comparison.per_prompt("brightness").loc[0]
    assert scores["brightness"] == pytest.approx([row["base"], row["aligned"]])
    assert list(scores) == ["brightness", "contrast"]


def test_contents_lead_to_every_section_in_order(full):
    page = Page(full.read_text())
    leads = [link["href"].removeprefix("#") for link in page.all("a")]
    assert leads == [section["id"] for section in page.all("section") if section["id"] in leads]
    assert leads[:3] == ["verdict", "examples", "scores"]
    assert set(leads) == {section["id"] for section in page.all("section")}


def test_examples_stand_under_the_verdict_and_curves_are_folded(full):
    text = full.read_text()
    examples = text[text.index('id="examples"') : text.index('id="scores"')]
    found = [examples.index(html.escape(PROMPTS[i], quote=False).replace("'", "&#39;")) for i in (0, 1, 4, 2, 3)]
    assert found == sorted(found)  # from the largest win to the largest loss
    training = text[text.index('id="training"') : text.index('id="made"')]
    assert training.index("<details") < training.index("<svg")
    assert "<details open" not in text


def test_charts_follow_the_page_colours(full):
    charts = re.findall(r"<svg.*?</svg>", full.read_text(), flags=re.DOTALL)
    assert len(charts) == 4 + 4
    assert all("var(--" in chart and not re.search(r"#0\d0\d01", chart) for chart in charts)
    assert all("aria-label" in chart and "<style" not in chart for chart in charts)


def test_without_pictures_and_training(tmp_path, comparison):
    page = Page(write_report(tmp_path / "report.html", comparison, title="Mine").read_text())
    assert not page.all("article")
    assert not page.all("dialog")
    assert not {"examples", "gallery", "training"} & {section["id"] for section in page.all("section")}
    assert "Mine" in page.text


def test_linked_pictures_are_relative(tmp_path, comparison, images):
    linked = {}
    for model, pictures in images.items():
        (tmp_path / model).mkdir()
        for key, image in pictures.items():
            linked.setdefault(model, {})[key] = tmp_path / model / f"{key[0]} {key[1]}.png"
            image.save(linked[model][key])
    file = write_report(tmp_path / "out" / "report.html", comparison, linked, embed=False)
    assert Page(file.read_text()).all("img")[0]["src"] == "../base/0%200.png"


def test_mistakes_are_named(tmp_path, comparison, images):
    with pytest.raises(UserError, match='Did you mean "contrast"'):
        write_report(tmp_path / "r.html", comparison, primary="contrst")
    del images["base"][(3, 3)]
    with pytest.raises(DataError, match='"base" for prompt 3 with seed 3'):
        write_report(tmp_path / "r.html", comparison, images)
    assert not list(tmp_path.iterdir())


def test_a_gallery_that_does_not_hold_all_shows_both_ends(comparison):
    # From the largest win to the largest loss the prompts are 0, 1, 4, 2, 3.
    assert choose_pairs(comparison, "brightness", 3) == [(0, 0), (1, 1), (3, 3)]
    assert len(choose_pairs(comparison, "brightness", 99)) == 5


def test_large_pictures_are_shrunk_and_small_ones_kept():
    large = picture(Image.effect_noise((1024, 768), 60))
    assert (large.width, large.height, large.pixelated) == (512, 384, False)
    small = picture(Image.effect_noise((64, 64), 60))
    assert small.source.startswith("data:image/png")
    assert small.pixelated


def test_metrics_of_a_resumed_and_of_a_killed_run(tmp_path):
    file = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "loss": 0.7}, {"step": 3, "loss": 0.6}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.4}]
    unfinished = '{"step": 4, "loss": NaN}\n{"ste'
    file.write_text("\n".join(map(json.dumps, records)) + "\n" + unfinished)
    assert read_metrics(file) == {"loss": ([1.0, 2.0, 3.0], [0.7, 0.5, 0.4])}
    file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"Line 2 of .*nonsense"):
        read_metrics(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_charts_only_of_what_was_logged(metrics):
    charts = {chart.title: chart for chart in training_charts(read_metrics(metrics))}
    assert list(charts) == ["Loss", "Implicit accuracy", "Drift", "Learning rate"]
    assert charts["Drift"].legend == (("aligned", "chosen"), ("loss", "rejected"))
    assert charts["Learning rate"].last == "1.00e-05"


def test_long_curves_are_thinned_without_moving_them():
    steps, values = thin(np.arange(1000.0), np.arange(1000.0) * 2)
    assert len(steps) <= 240
    assert np.allclose(values, 2 * steps)
    assert running_mean(np.array([0.0, 3.0, 6.0, 9.0]), 1).tolist() == [1.5, 3.0, 6.0, 7.5]


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_parses(full, tmp_path):
    script = full.read_text().split("<script>")[-1].split("</script>")[0]
    (tmp_path / "report.js").write_text(script)
    assert subprocess.run(["node", "--check", tmp_path / "report.js"], check=False).returncode == 0
