import json

import pytest
import torch

import reward_models
from reward_models.base import ScorerError
from reward_models.composite import normalised
from tests.reward_models.toy import PROMPTS, noise_image, random_images

IMAGES = [noise_image(seed) for seed in range(6)]


@pytest.fixture
def recipe(scorer_places, tmp_path):
    """Write a recipe of PickScore and the aesthetic score."""

    def write(normalise="affine", weights=(1.0, 1.0), **more):
        parts = [
            {"name": name, "path": str(scorer_places[name]), "weight": weight}
            for name, weight in zip(("pickscore", "aesthetic"), weights, strict=True)
        ]
        file = tmp_path / f"{normalise}.json"
        file.write_text(json.dumps({"normalise": normalise, "scorers": parts, **more}))
        return file

    return write


def parts_of(scorer_places, prompt):
    return [reward_models.load(name, scorer_places[name]).score(IMAGES, prompt) for name in ("pickscore", "aesthetic")]


def test_an_affine_composite_is_the_weighted_sum(recipe, scorer_places):
    scorer = reward_models.load("composite", recipe(weights=(2.0, -0.5)))
    pick, aesthetic = parts_of(scorer_places, PROMPTS[0])
    torch.testing.assert_close(scorer.score(IMAGES, PROMPTS[0]), 2 * pick - 0.5 * aesthetic, atol=1e-4, rtol=1e-5)
    raw = scorer.raw_scores(IMAGES, PROMPTS[0])
    torch.testing.assert_close(raw, torch.stack([pick, aesthetic]), atol=2e-5, rtol=1e-5)
    assert scorer.raw_scores([], []).shape == (2, 0)


def test_fit_makes_the_parts_weigh_alike(recipe, scorer_places, tmp_path):
    scorer = reward_models.load("composite", recipe()).fit(IMAGES, PROMPTS[0])
    pick, aesthetic = parts_of(scorer_places, PROMPTS[0])
    expected = sum((scores - scores.mean()) / scores.std() for scores in (pick, aesthetic))
    torch.testing.assert_close(scorer.score(IMAGES, PROMPTS[0]), expected, atol=1e-3, rtol=1e-3)
    again = reward_models.load("composite", scorer.save(tmp_path / "saved"))
    assert again.parts[0].scale == scorer.parts[0].scale
    assert torch.equal(again.score(IMAGES, PROMPTS[0]), scorer.score(IMAGES, PROMPTS[0]))


def test_fit_needs_a_spread(recipe):
    with pytest.raises(ScorerError, match="spread of every part on 1 image"):
        reward_models.load("composite", recipe()).fit(IMAGES[:1], PROMPTS[0])


@pytest.mark.parametrize("how", ["centre", "zscore", "rank"])
def test_groups_are_normalised_each_on_its_own(recipe, scorer_places, how):
    scorer = reward_models.load("composite", recipe(how, weights=(1.0, 0.5)))
    pick, aesthetic = parts_of(scorer_places, PROMPTS[0])
    expected = normalised(pick[:4], how) + 0.5 * normalised(aesthetic[:4], how)
    groups = scorer.score_groups([(PROMPTS[0], IMAGES[:4]), (PROMPTS[1], IMAGES[4:])])
    torch.testing.assert_close(groups[0], expected, atol=1e-4, rtol=1e-4)
    matrix = scorer.score_matrix(IMAGES[:4], PROMPTS[:2])
    torch.testing.assert_close(matrix[:, 0], expected, atol=1e-4, rtol=1e-4)
    for call in (lambda: scorer.score(IMAGES, PROMPTS[0]), lambda: scorer.score_tensor(random_images(2), "a flag")):
        with pytest.raises(ScorerError, match=f'"{how}", which compares the images of one prompt: use score_groups'):
            call()


def test_normalisations_by_hand():
    scores = torch.tensor([3.0, 1.0, 3.0, 5.0])
    assert normalised(scores, "rank").tolist() == pytest.approx([0.5, 0.0, 0.5, 1.0])
    assert normalised(scores, "centre").tolist() == [0.0, -2.0, 0.0, 2.0]
    assert normalised(scores, "zscore").tolist() == pytest.approx([0.0, -(2**0.5), 0.0, 2**0.5])
    assert normalised(scores, "affine", 1.0, 2.0).tolist() == [1.0, 0.0, 1.0, 2.0]
    assert normalised(torch.ones(3), "zscore").tolist() == [0.0] * 3
    assert normalised(torch.ones(3), "rank").tolist() == [0.5] * 3
    assert [normalised(torch.ones(1), how).item() for how in ("zscore", "rank", "centre")] == [0.0, 0.5, 0.0]


def test_gradients_flow_through_all_parts(recipe):
    gradients = []
    for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        images = random_images(2, 40).requires_grad_()
        reward_models.load("composite", recipe(weights=weights)).score_tensor(images, PROMPTS[0]).sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2], atol=1e-6, rtol=1e-4)
    assert gradients[1].abs().sum() > 0 < gradients[2].abs().sum()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scorers": []}, "at least one scorer"),
        ({"scorers": [{"name": "pickscore", "scale": 0}]}, "scales above 0"),
        ({"scorers": [{"name": "pickscore"}], "normalise": "max"}, '"max"'),
        ({"scorers": [{"name": "pickscore"}], "extra": 1}, "extra"),
        ({"scorers": [{"name": "pickscore", "wieght": 1}]}, "wieght"),
        ({}, "no composite recipe"),
        ({"scorers": [{"name": "pikscore"}]}, "Did you mean"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, content, message):
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(ScorerError, match=message):
        reward_models.load("composite", tmp_path / "recipe.json")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ScorerError, match="no recipe"):
        reward_models.load("composite", tmp_path)
