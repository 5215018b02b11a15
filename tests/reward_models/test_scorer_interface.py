import io

import numpy as np
import pytest
import torch

import reward_models
from reward_models.base import Scorer, ScorerError
from tests.reward_models.toy import noise_image, random_images

IMAGES = [noise_image(seed, *size) for seed, size in enumerate([(32, 32), (48, 32), (32, 50), (64, 64), (200, 90)])]
TEXTS = ["a red square", "a blue wall", "a red square", "", "a green flag " * 20]


def test_scores_are_float32_on_the_cpu_and_differ(scorer):
    scores = scorer.score(IMAGES, TEXTS)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scores.unique().numel() == 5


def test_a_score_depends_on_image_and_prompt_only(scorer):
    scores = scorer.score(IMAGES, TEXTS)
    one_by_one = torch.cat([scorer.score(image, text) for image, text in zip(IMAGES, TEXTS, strict=True)])
    scorer.batch_size = 2
    scorer.clear_cache()
    torch.testing.assert_close(scorer.score(IMAGES, TEXTS), scores, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(one_by_one, scores, atol=2e-5, rtol=1e-5)
    assert torch.equal(scorer.score(IMAGES, TEXTS), scorer.score(IMAGES, TEXTS))


def test_forms_of_an_image_score_alike(scorer, tmp_path):
    buffer = io.BytesIO()
    IMAGES[4].save(buffer, "PNG")
    IMAGES[4].save(tmp_path / "image.png")
    array = np.asarray(IMAGES[4])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [
        IMAGES[4],
        buffer.getvalue(),
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        array,
        tensor,
        tensor / 255,
    ]
    scores = scorer.score(forms, "a red square")
    torch.testing.assert_close(scores, scores[:1].expand(7), atol=1e-5, rtol=1e-5)


def test_one_prompt_serves_all_images_and_one_image_is_a_batch(scorer):
    assert torch.equal(scorer.score(IMAGES, "a flag"), scorer.score(IMAGES, ["a flag"] * 5))
    tensors = random_images(3)
    assert scorer.score(tensors, "a flag").shape == (3,)
    assert scorer.score(tensors[0], "a flag").shape == (1,)
    assert scorer.score([], []).shape == (0,)


def test_compare_is_the_probability_of_the_difference(scorer):
    a, b = IMAGES[:2], IMAGES[2:4]
    probability = scorer.compare(a, b, TEXTS[:2])
    logit = (scorer.score(a, TEXTS[:2]) - scorer.score(b, TEXTS[:2])) * scorer.preference_scale
    torch.testing.assert_close(probability, logit.sigmoid(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scorer.compare(b, a, TEXTS[:2]), 1 - probability, atol=1e-5, rtol=1e-5)
    assert (probability - 0.5).abs().max() > 1e-3
    assert torch.equal(scorer.compare(a, a, TEXTS[:2]), torch.full((2,), 0.5))


def test_preference_scale_makes_both_scorers_logits_the_trained_ones(scorer):
    """A logit is exp(logit_scale) * cosine difference for both; PickScore has the scale in its score, HPSv2 has not."""
    cosine = scorer.image_embeddings(scorer.pixels(IMAGES[:2])) @ scorer.text_embeddings(["a flag"]).T
    expected = float(scorer.logit_scale) * float(cosine[0, 0] - cosine[1, 0])
    assert torch.logit(scorer.compare(IMAGES[0], IMAGES[1], "a flag")).item() == pytest.approx(expected, abs=1e-4)
    score_scale = float(scorer.logit_scale) if scorer.name == "pickscore" else 1.0
    assert scorer.score(IMAGES[0], "a flag").item() == pytest.approx(score_scale * cosine[0, 0].item(), abs=1e-5)


def test_score_matrix_holds_every_pairing(scorer):
    matrix = scorer.score_matrix(IMAGES, TEXTS)
    assert matrix.shape == (5, 5)
    torch.testing.assert_close(matrix.diagonal(), scorer.score(IMAGES, TEXTS), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(matrix, Scorer.score_matrix(scorer, IMAGES, TEXTS), atol=2e-5, rtol=1e-5)
    assert scorer.score_matrix(IMAGES, []).shape == (5, 0)
    assert scorer.score_matrix(random_images(2)[0], "a flag").shape == (1, 1)


@pytest.mark.parametrize("size", [32, 48])
def test_score_tensor_agrees_with_score(scorer, size):
    images = random_images(4, size)
    exact = size == scorer.spec.size or scorer.name == "hpsv2"  # else PIL's filter against the tensor filter
    tolerance = 2e-5 if exact else 0.02 * scorer.score(images, "a flag").std().item() + 2e-3
    difference = scorer.score_tensor(images, "a flag") - scorer.score(images, "a flag")
    assert difference.abs().max() < tolerance


def test_score_tensor_differentiates_to_the_pixels(scorer):
    images = random_images(2, 40).requires_grad_()
    scores = scorer.score_tensor(images, ["a red square", "a blue wall"])
    scores.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in scorer.module.parameters())
    # a small step along the gradient raises every score by about |gradient|^2
    step = 1e-2 / images.grad.flatten(1).norm(dim=1).max()
    moved = scorer.score_tensor(images.detach() + step * images.grad, ["a red square", "a blue wall"])
    expected = step * images.grad.flatten(1).square().sum(dim=1)
    torch.testing.assert_close(moved - scores.detach(), expected, rtol=0.1, atol=1e-5)


def test_score_then_score_tensor_shares_the_text_cache(scorer):
    scorer.score(IMAGES[:1], "a flag")
    images = random_images(1).requires_grad_()
    scorer.score_tensor(images, "a flag").sum().backward()  # fails if the cache held inference-mode tensors
    assert images.grad is not None


def test_each_prompt_is_embedded_once(scorer, monkeypatch):
    seen = []
    tokenize = scorer.tokenize
    monkeypatch.setattr(scorer, "tokenize", lambda prompts: seen.extend(prompts) or tokenize(prompts))
    scorer.score(IMAGES, TEXTS)
    scorer.score_matrix(IMAGES[:2], TEXTS)
    assert sorted(seen) == sorted(set(TEXTS))
    scorer.clear_cache()
    scorer.score(IMAGES, TEXTS)
    assert len(seen) == 2 * len(set(TEXTS))


def test_the_text_cache_is_bounded(scorer, monkeypatch):
    monkeypatch.setattr("reward_models.two_tower.CACHED_PROMPTS", 3)
    prompts = [f"prompt {index}" for index in range(6)]
    assert torch.isfinite(scorer.score([IMAGES[0]] * 6, prompts)).all()
    assert list(scorer._text_cache) == prompts[3:]


def test_half_precision_keeps_the_scale_and_the_order_of_magnitude(scorer_name, scorer_folder, scorer):
    half = reward_models.load(scorer_name, scorer_folder, dtype=torch.bfloat16)
    assert half.logit_scale == scorer.logit_scale
    scores, exact = half.score(IMAGES, TEXTS), scorer.score(IMAGES, TEXTS)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    on_grid = scores.to(torch.bfloat16).float() == scores
    assert not on_grid.all()  # the product is not rounded to the network's dtype


def test_the_batch_is_halved_when_memory_runs_out(scorer, monkeypatch):
    score_pixels, sizes = scorer.score_pixels, []

    def limited(pixels, prompts):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("only two fit")
        return score_pixels(pixels, prompts)

    expected = scorer.score(IMAGES, TEXTS)
    monkeypatch.setattr(scorer, "score_pixels", limited)
    scorer.batch_size = 8
    torch.testing.assert_close(scorer.score(IMAGES, TEXTS), expected, atol=2e-5, rtol=1e-5)
    assert sizes == [5, 4, 2, 2, 1]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (IMAGES, ["one", "two"], "5 images and 2 prompts"),
        (IMAGES[:2], ["one", None], "must be a string, got None"),
        (IMAGES[:2], ["one", "cut \ud83d"], "half of a character"),
        ([IMAGES[0], "missing.png"], "a flag", "missing.png"),
    ],
)
def test_mistakes_are_named(scorer, images, prompts, message):
    with pytest.raises(ScorerError, match=message):
        scorer.score(images, prompts)


def test_compare_needs_two_equal_sides(scorer):
    with pytest.raises(ScorerError, match="5 and 4"):
        scorer.compare(IMAGES, IMAGES[:4], "a flag")


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_score_tensor_refuses_other_tensors(scorer, images):
    with pytest.raises(ScorerError, match="floating-point images"):
        scorer.score_tensor(images, "a flag")


def test_a_score_that_is_not_finite_is_an_error(scorer):
    with torch.no_grad():
        next(scorer.module.parameters()).fill_(float("nan"))
    scorer.clear_cache()
    with pytest.raises(ScorerError, match="image 0 the score nan"):
        scorer.score(IMAGES[:2], "a flag")
