"""Recipes travel to other processes and give the same pixels; an identity changes with whatever changes a score."""

import dataclasses
import pickle

import pytest
import torch

import reward_models
from reward_models import base
from reward_models.base import ScorerError
from tests.reward_models.toy import noise_image

IMAGES = [noise_image(seed, *size) for seed, size in enumerate([(32, 32), (48, 32), (32, 50), (64, 64), (200, 90)])]
TEXTS = ["a red square", "a blue wall", "a red square", "", "a green flag"]


@pytest.mark.parametrize("name", reward_models.names())
def test_pixels_made_elsewhere_give_the_same_scores(name, scorer_places):
    scorer = reward_models.load(name, scorer_places[name])
    recipe = pickle.loads(pickle.dumps(scorer.recipe))
    assert recipe == scorer.recipe
    pixels = torch.stack([recipe(image) for image in IMAGES])
    assert torch.equal(pixels, scorer.pixels(IMAGES))
    assert torch.equal(scorer.score_prepared(pixels, TEXTS), scorer.score(IMAGES, TEXTS))


@pytest.mark.parametrize("name", reward_models.names())
def test_an_identity_is_the_same_every_time_and_another_for_other_weights(name, scorer_places):
    scorer, again = (reward_models.load(name, scorer_places[name]) for _ in range(2))
    assert scorer.identity == again.identity
    parts = again.scorers if name == "composite" else [again]
    list(parts[-1].module.parameters())[-1].data.view(-1)[0] += 0.5
    assert again.identity != scorer.identity


def test_an_identity_depends_on_precision_pixels_and_words(scorer, scorer_name, scorer_folder):
    found = {scorer.identity, reward_models.load(scorer_name, scorer_folder, dtype=torch.bfloat16).identity}
    scorer.spec = dataclasses.replace(scorer.spec, mean=(0.5, 0.5, 0.5))
    found.add(scorer.identity)
    tokenize = scorer.tokenize
    scorer.tokenize = lambda prompts: tokenize(prompts).flip(0)
    found.add(scorer.identity)
    assert len(found) == 4


def test_auto_doubles_the_batch_until_memory_runs_out(scorer, monkeypatch):
    images, sizes, inner = [IMAGES[0]] * 40, [], scorer.score_pixels

    def limited(pixels, prompts):
        sizes.append(len(pixels))
        if len(pixels) > 9:
            raise torch.OutOfMemoryError("only nine fit")
        return inner(pixels, prompts)

    expected = scorer.score(images, "a flag")
    monkeypatch.setattr(scorer, "score_pixels", limited)
    monkeypatch.setattr(base, "GROWING", ("cpu",))
    scorer.batch_size = 2
    torch.testing.assert_close(scorer.score(images, "a flag", batch_size="auto"), expected, atol=2e-5, rtol=1e-5)
    assert sizes == [2, 4, 8, 16, 8, 8, 8, 2]
    scorer.score(images[:8], "a flag")
    assert sizes[-1] == 8  # what fits is kept


def test_a_processor_starts_no_growing(scorer):
    scorer.score([IMAGES[0]] * 3, "a flag", batch_size="auto")
    assert scorer.batch_size == 32
    scorer.score([IMAGES[0]] * 3, "a flag", batch_size=2)
    assert scorer.batch_size == 2


@pytest.mark.parametrize("size", [0, -1, 2.5, "much"])
def test_unusable_batch_sizes_are_named(scorer, size):
    with pytest.raises(ScorerError, match="batch_size"):
        scorer.score(IMAGES[:1], "a flag", batch_size=size)
