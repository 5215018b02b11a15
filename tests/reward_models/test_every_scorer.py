"""What holds for each scorer of the package, on tiny networks of the official layouts."""

import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import reward_models
from reward_models.base import Scorer, ScorerError
from tests.reward_models.toy import noise_image, random_images

NAMES = reward_models.names()
IMAGES = [noise_image(seed, *size) for seed, size in enumerate([(32, 32), (48, 32), (32, 50), (64, 64), (200, 90)])]
TEXTS = ["a red square", "a blue wall", "a red square", "", "a green flag"]
READERS = [name for name in NAMES if name != "aesthetic"]
WITH_WEIGHTS = [name for name in NAMES if name != "composite"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def any_scorer(name, scorer_places):
    return reward_models.load(name, scorer_places[name])


def test_the_tiny_scorers_are_all_there_are(scorer_places):
    assert sorted(scorer_places) == NAMES


def test_scores_are_float32_numbers_of_single_images(any_scorer):
    scores = any_scorer.score(IMAGES, TEXTS)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert scores.unique().numel() >= 4  # two images of one text may round to the same score in so small a network
    one_by_one = torch.cat([any_scorer.score(image, text) for image, text in zip(IMAGES, TEXTS, strict=True)])
    any_scorer.batch_size = 2
    torch.testing.assert_close(any_scorer.score(IMAGES, TEXTS), scores, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(one_by_one, scores, atol=5e-5, rtol=1e-4)
    assert any_scorer.score([], []).shape == (0,)


def test_matrix_and_groups_hold_the_same_numbers(any_scorer):
    scores = any_scorer.score(IMAGES, TEXTS)
    matrix = any_scorer.score_matrix(IMAGES, TEXTS)
    torch.testing.assert_close(matrix.diagonal(), scores, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(matrix, Scorer.score_matrix(any_scorer, IMAGES, TEXTS), atol=5e-5, rtol=1e-4)
    groups = any_scorer.score_groups([(TEXTS[0], IMAGES[:2]), (TEXTS[1], []), (TEXTS[4], iter(IMAGES[2:]))])
    assert [len(group) for group in groups] == [2, 0, 3]
    torch.testing.assert_close(groups[0], matrix[:2, 0], atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(groups[2], matrix[2:, 4], atol=5e-5, rtol=1e-4)
    assert any_scorer.score_groups([]) == []
    assert any_scorer.score_matrix([], TEXTS).shape == (0, 5)


def test_a_preference_is_the_sigmoid_of_the_scaled_difference(any_scorer):
    probability = any_scorer.compare(IMAGES[:2], IMAGES[2:4], "a flag")
    scores = any_scorer.score(IMAGES[:4], "a flag") * any_scorer.preference_scale
    torch.testing.assert_close(probability, torch.sigmoid(scores[:2] - scores[2:]), atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_pixels(any_scorer):
    images = random_images(2, 40).requires_grad_()
    scores = any_scorer.score_tensor(images, ["a red square", "a blue wall"])
    assert scores.shape == (2,)
    (scores - scores.detach() + 1).prod().backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in any_scorer.module.parameters())
    step = 1e-2 / images.grad.flatten(1).norm(dim=1).max()
    moved = any_scorer.score_tensor(images.detach() + step * images.grad, ["a red square", "a blue wall"])
    expected = step * images.grad.flatten(1).square().sum(dim=1)
    torch.testing.assert_close(moved - scores.detach(), expected, rtol=0.15, atol=2e-4)


def test_tensors_and_pictures_score_alike(any_scorer):
    images = random_images(4, 32)
    tolerance = 5e-5 * max(1.0, any_scorer.score(images, "a flag").abs().max().item())
    difference = any_scorer.score_tensor(images, "a flag") - any_scorer.score(images, "a flag")
    assert difference.abs().max() < tolerance


def test_saving_gives_the_same_scores_in_a_folder_of_safetensors(any_scorer, name, scorer_places, tmp_path):
    folder = reward_models.convert(name, scorer_places[name], tmp_path / "converted")
    assert not [file for file in folder.iterdir() if file.suffix in (".pt", ".bin", ".pth", ".ckpt")]
    again = reward_models.load(name, folder)
    torch.testing.assert_close(again.score(IMAGES, TEXTS), any_scorer.score(IMAGES, TEXTS), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_missing_weight_and_a_wrong_shape_are_errors(name, scorer_places, tmp_path):
    folder = shutil.copytree(scorer_places[name], tmp_path / "copy")
    for file in folder.glob("*.safetensors"):
        state = load_file(file)
        for key in sorted(state)[:: max(1, len(state) // 4)]:
            save_file({other: value for other, value in state.items() if other != key}, file)
            with pytest.raises(ScorerError, match=r"does not fit|not LAION's linear head"):
                reward_models.load(name, folder)
            wrong = torch.zeros(*state[key].shape, 2)
            save_file({**state, key: wrong}, file)
            with pytest.raises((ScorerError, RuntimeError), match=r"of another shape|mat1|matrix|size"):
                reward_models.load(name, folder)
        save_file({**state, "surplus.weight": torch.zeros(2)}, file)
        with pytest.raises(ScorerError, match=r"surplus"):
            reward_models.load(name, folder)
        save_file(state, file)
    reward_models.load(name, folder)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_pickled_module_is_refused(name, scorer_places, tmp_path):
    folder = shutil.copytree(scorer_places[name], tmp_path / "copy")
    file = folder / "whole.pth"
    torch.save(torch.nn.Linear(2, 2), file)
    if name == "pal":
        pytest.skip("PAL reads its own folder only")
    with pytest.raises(ScorerError, match=r"(?s)run code.*weights_only=False.*save_file"):
        reward_models.load(name, file)


@pytest.mark.parametrize("name", READERS)
def test_long_prompts_are_cut_and_reported_once(name, scorer_places, caplog):
    scorer = reward_models.load(name, scorer_places[name])
    long = "a red square on a blue wall " * 40
    counts = scorer.token_counts(["a red square", long])
    assert counts[0] <= scorer.text_length < counts[1]
    with caplog.at_level(logging.WARNING, "reward_models"):
        first = scorer.score(IMAGES[:2], ["a red square", long])
        scorer.score(IMAGES[:2], ["a red square", long])
    parts = scorer.scorers if name == "composite" else [scorer]
    readers = [part for part in parts if part.text_length is not None]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(readers)
    assert all(part.cut_prompts == {long: part.token_counts([long])[0]} for part in readers)
    more = scorer.score(IMAGES[1], long + " and a flag")  # nothing after the cut is read
    torch.testing.assert_close(more, first[1:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", READERS)
def test_a_prompt_must_be_given_where_it_is_read(name, scorer_places):
    with pytest.raises(ScorerError, match="reads the prompt"):
        reward_models.load(name, scorer_places[name]).score(IMAGES)


def test_the_aesthetic_score_needs_no_prompt(scorer_places):
    scorer = reward_models.load("aesthetic", scorer_places["aesthetic"])
    assert torch.equal(scorer.score(IMAGES), scorer.score(IMAGES, TEXTS))
    assert torch.equal(scorer.score_tensor(random_images(2)), scorer.score_tensor(random_images(2), "x"))


@pytest.mark.parametrize("name", ["pal", "composite"])
def test_unpublished_weights_have_to_be_given(name):
    with pytest.raises(ScorerError, match="Nobody has published"):
        reward_models.load(name)


def test_half_precision_gives_close_scores(name, scorer_places, any_scorer):
    half = reward_models.load(name, scorer_places[name], dtype=torch.bfloat16)
    exact, scores = any_scorer.score(IMAGES, TEXTS), half.score(IMAGES, TEXTS)
    assert scores.dtype == torch.float32
    assert not (scores.to(torch.bfloat16).float() == scores).all()
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


def test_the_cpu_running_out_of_memory_halves_the_batch(any_scorer, monkeypatch):
    expected, score_pixels, sizes = any_scorer.score(IMAGES, TEXTS), any_scorer.score_pixels, []

    def limited(pixels, prompts, *more):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return score_pixels(pixels, prompts, *more)

    monkeypatch.setattr(any_scorer, "score_pixels", limited)
    any_scorer.batch_size = 4
    torch.testing.assert_close(any_scorer.score(IMAGES, TEXTS), expected, atol=5e-5, rtol=1e-4)
    assert sizes == [4, 2, 2, 1]
    monkeypatch.setattr(any_scorer, "score_pixels", lambda *_: (_ for _ in ()).throw(RuntimeError("a real mistake")))
    with pytest.raises(RuntimeError, match="a real mistake"):
        any_scorer.score(IMAGES, TEXTS)


def test_every_card_tells_what_the_scorer_does(any_scorer):
    assert any_scorer.card == reward_models.card(any_scorer.name)
    assert (any_scorer.text_length is None) == (any_scorer.card.text_length is None)
    assert math.isfinite(any_scorer.preference_scale)
