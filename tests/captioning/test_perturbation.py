"""Perturbations: DIPPER as published and keyed by the text, and words left out."""

import pytest
import torch

from diffalign.captioning import LEVELS, Dipper, DroppedWords, Question
from diffalign.captioning.dipper import KeyedSampling
from diffalign.errors import ModelError
from tests.captioning.models import write_dipper

CPU = torch.device("cpu")
TEXTS = ("a red circle on a blue background", "the cat. a cat! on the square, a photo. of a green circle.", "a circle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dipper(tmp_path_factory.mktemp("models") / "dipper")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("diffalign.captioning.dipper.LENGTH", 12)  # random weights never stop


def dipper(folder, level="weak", **settings):
    return Dipper(level, str(folder), CPU, torch.float32, weights="w", **settings)


def perturbed(by, texts=TEXTS):
    return [text for batch in by.answers([Question(text) for text in texts]) for _, text in batch]


def test_a_text_becomes_the_same_in_any_batch(folder):
    together = perturbed(dipper(folder, batch_size=3))
    assert together == perturbed(dipper(folder, batch_size=1))
    assert together == [*perturbed(dipper(folder), TEXTS[:1]), *perturbed(dipper(folder), TEXTS[1:])]
    assert together != perturbed(dipper(folder, seed=1))


def test_it_is_asked_as_the_authors_ask(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(Dipper, "_sample", lambda self, texts, seeds: asked.append(texts) or ["new"] * len(texts))
    assert perturbed(dipper(folder, "medium")) == ["new", "new new", "new"]
    prefix = "Paraphrase and perturb the following image caption."
    assert asked == [
        [
            f"lexical = 40, order = 100 {prefix} <sent> {TEXTS[0]} </sent>",
            f"lexical = 40, order = 100 {prefix} <sent> the cat. a cat! on the square, a photo. </sent>",
            f"lexical = 40, order = 100 {prefix} <sent> a circle </sent>",
        ],
        [f"lexical = 40, order = 100 {prefix} new <sent> of a green circle. </sent>"],
    ]


def test_keyed_sampling_draws_from_the_nucleus():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, 4)
    drawn = KeyedSampling(range(4000), top_p=0.75)(torch.zeros(4000, 1, dtype=torch.long), logits).argmax(1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)


def test_words_are_left_out():
    caption = "a small red circle on the left on a blue background"
    kept = {level: DroppedWords(level).perturb(caption).split() for level in LEVELS}
    assert [len(words) for words in kept.values()] == [9, 7, 4]
    left = iter(caption.split())
    assert all(word in left for word in kept["weak"])  # in their order
    assert DroppedWords("weak", seed=1).perturb(caption) != " ".join(kept["weak"])
    assert DroppedWords("strong").perturb("circle") == "circle"


def test_a_missing_paraphraser_is_named(tmp_path):
    with pytest.raises(ModelError, match=r'Cannot load the paraphraser ".*none".*or words'):
        perturbed(dipper(tmp_path / "none"))
