"""SPO's own judge in the loop: the step-aware model is told how noisy each step was."""

from pathlib import Path

import pytest
import torch

from diffalign.rollout import PictureScorer, StepPairs
from reward_models.step_aware import StepAware

PICKSCORE = Path(__file__).parents[2] / "assets" / "tiny-pickscore"


@pytest.fixture(scope="module")
def judge():
    """Return a step-aware model of the embedded world's sizes whose scores depend on the timestep."""
    scorer = StepAware.from_clip(PICKSCORE)
    with torch.no_grad():
        for name, value in scorer.module.named_parameters():
            if "adaLN" in name and name.endswith("weight"):
                value.normal_(std=0.3)
    return scorer


@pytest.fixture
def told(judge, monkeypatch):
    """Return a list of the timesteps that the judge is told."""
    seen = []
    score = judge.score_tensor

    def score_tensor(images, prompts, timesteps=0):
        seen.extend(timesteps.tolist())
        return score(images, prompts, timesteps)

    monkeypatch.setattr(judge, "score_tensor", score_tensor)
    return seen


def test_the_timesteps_of_the_candidates_reach_the_judge(judge, told, backbone, make_sampler, prompts):
    sampler = make_sampler(num_inference_steps=5)
    scorer = PictureScorer(backbone, [judge], 4, sampler.evaluations)
    StepPairs(sampler=sampler, scorer=scorer, divert_start_step=2, num_candidates=2)(prompts, step=0)
    candidates = 2 * len(prompts)
    levels = [*sampler.ladder.timesteps[3:].tolist(), 0]  # the last candidates are finished pictures
    assert told == [level for level in levels for _ in range(candidates)]


def test_the_same_latents_score_otherwise_at_another_timestep(judge, backbone, make_sampler):
    scorer = PictureScorer(backbone, [judge], 4, make_sampler().evaluations)
    latents, texts = torch.randn(3, 4, 8, 8), ["a red circle"] * 3
    early, late = (scorer(latents, texts, torch.full((3,), timestep)) for timestep in (901, 1))
    assert (early - late).abs().min() > 1e-3


@pytest.mark.parametrize(("count", "sizes"), [(5, [3, 2]), (8, [4, 4]), (9, [3, 3, 3])])
def test_pictures_are_decoded_in_parts_of_equal_size(count, sizes, backbone, make_sampler, monkeypatch):
    found, decode = [], backbone.decode_latents
    monkeypatch.setattr(backbone, "decode_latents", lambda x: found.append(len(x)) or decode(x))
    scorer = PictureScorer(backbone, [_Mean()], 4, make_sampler().evaluations)
    scores = scorer(torch.randn(count, 4, 8, 8), ["a"] * count, torch.zeros(count, dtype=torch.int64))
    assert found == sizes
    assert scores.shape == (1, count)


class _Mean:
    def score_tensor(self, images, prompts):
        return images.flatten(1).mean(1)
