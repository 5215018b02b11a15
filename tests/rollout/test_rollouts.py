"""Rollouts on a tiny SDXL: what they cost, what they record, and what they depend on."""

import pytest
import torch

from diffalign.backbones.conditioning import Conditioning
from diffalign.denoising import STABLE_DIFFUSION, DDPMPath, FrozenDenoiser, guided, transition_likelihoods
from diffalign.errors import ConfigError
from diffalign.rollout import PictureScorer, PromptEncoder, StepPairs, Trajectories, TrajectoryPairs
from tests.rollout.conftest import TEXTS, Brightness


def assert_follows(batch, sampler):
    """Assert that pairs lie on the ladder, start at one latent, and end at different ones."""
    levels = dict(zip(sampler.ladder.timesteps.tolist(), sampler.ladder.previous.tolist(), strict=True))
    assert [levels[t] for t in batch.timesteps.tolist()] == batch.previous.tolist()
    assert not torch.equal(batch.x_prev[:, 0], batch.x_prev[:, 1])


def test_a_prompt_of_spo_costs_what_the_paper_says(backbone, make_sampler, prompts):
    sampler = make_sampler(guidance_scale=1.0, num_inference_steps=20)
    scorer = PictureScorer(backbone, [_Mean()], 32, sampler.evaluations)
    one = prompts.__class__(TEXTS[:1], prompts.ids[:1], prompts.cond.select([0]), prompts.empty)
    rollout = StepPairs(sampler=sampler, scorer=scorer)(one, step=0)
    assert sampler.evaluations.predicted == 4 + 1 + 15 * 4
    assert sampler.evaluations.decoded == 16 * 4
    batch = rollout.transitions
    assert batch.timesteps.tolist() == sampler.ladder.timesteps[4:].tolist()
    assert batch.xt.shape == (16, 1, 4, 8, 8)
    assert batch.x_prev.shape == (16, 2, 4, 8, 8)
    assert_follows(batch, sampler)


class _Mean:
    """Score pictures by brightness, as a reward model would be called."""

    preference_scale = 50.0

    def score_tensor(self, images, prompts):
        assert images.shape[0] == len(prompts)
        return images.flatten(1).mean(1)


def test_the_next_latent_is_one_of_the_candidates_and_winners_score_higher(make_sampler, prompts):
    sampler, scorer = make_sampler(num_inference_steps=5), Brightness(scale=1e6)
    pairs = StepPairs(sampler=sampler, scorer=scorer, divert_start_step=2, num_candidates=2)
    batch = pairs(prompts, step=1).transitions
    assert batch.kept.all()
    assert pairs.examples_per_prompt * len(prompts) == len(batch)
    for place in range(len(prompts)):
        mine = batch.select((batch.prompt == place).nonzero().squeeze(1))
        for index in range(len(mine) - 1):  # with two candidates one of winner and loser is where it goes on
            after = mine.xt[index + 1, 0]
            assert any(torch.equal(after, mine.x_prev[index, side]) for side in (0, 1))
        means = mine.x_prev[-1].flatten(1).mean(1)  # the last candidates are the finished latents themselves
        assert means[0] > means[1]
    assert scorer.timesteps == [*sampler.ladder.timesteps[3:].tolist(), 0]


def test_resampling_is_random_whatever_the_scores(make_sampler, prompts):
    sampler = make_sampler(num_inference_steps=6, guidance_scale=1.0)
    batch = StepPairs(sampler=sampler, scorer=Brightness(), divert_start_step=0, num_candidates=2)(
        prompts, 0
    ).transitions
    wins = 0
    for place in range(len(prompts)):
        mine = batch.select((batch.prompt == place).nonzero().squeeze(1))
        wins += sum(torch.equal(mine.xt[i + 1, 0], mine.x_prev[i, 0]) for i in range(5))
    assert 0 < wins < 15
    best = StepPairs(sampler=sampler, scorer=Brightness(), divert_start_step=0, num_candidates=2, resample="best")
    batch = best(prompts, 0).transitions
    mine = batch.select((batch.prompt == 0).nonzero().squeeze(1))
    assert all(torch.equal(mine.xt[i + 1, 0], mine.x_prev[i, 0]) for i in range(5))


def test_inner_steps_share_the_label_of_their_branch(make_sampler, prompts):
    sampler, scorer = make_sampler(num_inference_steps=8), Brightness()
    how = StepPairs(sampler=sampler, scorer=scorer, divert_start_step=2, num_candidates=2, num_inner_steps=2)
    batch = how(prompts, step=0).transitions
    assert batch.xt.shape == (18, 2, 4, 8, 8)
    mine = batch.select((batch.prompt == 1).nonzero().squeeze(1))
    assert mine.timesteps.tolist() == sampler.ladder.timesteps[2:].tolist()
    assert torch.equal(mine.xt[0, 0], mine.xt[0, 1])
    for index in (0, 1, 3, 4):  # within a branch each goes on from its own latent
        assert torch.equal(mine.xt[index + 1], mine.x_prev[index])
    assert torch.equal(mine.xt[3, 0], mine.xt[3, 1])
    # Two single steps, one at the branch point, 2 + 2 inner ones, twice; the predictions that judge the first branch.
    assert sampler.evaluations.predicted == 3 * (2 + 1 + 2 * (2 * 2) + 2)
    assert len(scorer.timesteps) == 2


def test_a_scorer_of_noisy_latents_needs_no_predictions_of_candidates(make_sampler, prompts):
    sampler, scorer = make_sampler(num_inference_steps=6), Brightness(reads_prediction=False)
    how = StepPairs(sampler=sampler, scorer=scorer, divert_start_step=0, timesteps_of="current", threshold_high=0.5)
    how(prompts, step=0)
    assert sampler.evaluations.predicted == 6 * len(prompts)
    assert scorer.timesteps == sampler.ladder.timesteps.tolist()


def test_pairs_of_trajectories_start_together_and_every_step_has_their_label(make_sampler, prompts):
    sampler = make_sampler(num_inference_steps=4)
    batch = TrajectoryPairs(sampler=sampler, scorer=Brightness())(prompts, step=0).transitions
    assert len(batch) == 4 * len(prompts)
    assert_follows(batch, sampler)
    mine = batch.select((batch.prompt == 2).nonzero().squeeze(1))
    assert torch.equal(mine.xt[0, 0], mine.xt[0, 1])
    assert torch.equal(mine.xt[1:], mine.x_prev[:-1])
    means = mine.x_prev[-1].flatten(1).mean(1)
    assert mine.label.tolist() == [1.0 if means[0] > means[1] else -1.0] * 4
    three = TrajectoryPairs(sampler=sampler, scorer=Brightness(), samples_per_prompt=3)
    assert len(three(prompts, step=0).transitions) == 3 * 4 * len(prompts) == three.examples_per_prompt * len(prompts)


def test_of_many_trajectories_the_best_and_the_worst_make_one_pair(make_sampler, prompts):
    sampler = make_sampler(num_inference_steps=3)
    common = {"sampler": sampler, "scorer": Brightness(), "samples_per_prompt": 4}
    one = TrajectoryPairs(**common, pairs="best_and_worst")
    batch, every = one(prompts, step=0).transitions, TrajectoryPairs(**common)(prompts, step=0).transitions
    assert len(batch) == 3 * len(prompts) == one.examples_per_prompt * len(prompts)
    assert (batch.label == 1).all()
    for place in range(len(prompts)):
        mine, all_pairs = (b.select((b.prompt == place).nonzero().squeeze(1)) for b in (batch, every))
        finished = all_pairs.x_prev[all_pairs.timesteps == 1].flatten(0, 1).flatten(1).mean(1)
        assert mine.x_prev[-1].flatten(1).mean(1).tolist() == [finished.max().item(), finished.min().item()]
        assert torch.equal(mine.xt[1:], mine.x_prev[:-1])


def test_only_the_steps_within_the_timesteps_asked_for_become_examples(make_sampler, prompts):
    sampler = make_sampler(num_inference_steps=10)  # 901, 801, ..., 1
    common = {"sampler": sampler, "scorer": Brightness(), "learnt_steps": sampler.steps_within(501, 801)}
    pairs = TrajectoryPairs(**common)
    single = Trajectories(**common, samples_per_prompt=2, advantages=lambda texts, ids, rewards: rewards)
    for collect, count in ((pairs, 1), (single, 2)):
        batch = collect(prompts, step=0).transitions
        assert set(batch.timesteps.tolist()) == {501, 601, 701}
        assert len(batch) == 3 * count * len(prompts) == collect.examples_per_prompt * len(prompts)
    every = TrajectoryPairs(sampler=sampler, scorer=Brightness())(prompts, step=0).transitions
    within = every.select(((every.timesteps >= 501) & (every.timesteps < 801)).nonzero().squeeze(1))
    assert torch.equal(within.x_prev, pairs(prompts, step=0).transitions.x_prev)  # they are drawn to the end as ever
    with pytest.raises(ConfigError, match=r"No step starts within denoising\.timestep_low 902"):
        sampler.steps_within(902)


def test_trajectories_of_a_prompt_start_together_or_apart(make_sampler, prompts):
    sampler = make_sampler(num_inference_steps=3)
    common = {"sampler": sampler, "scorer": Brightness(), "samples_per_prompt": 2}
    worth = {"advantages": lambda texts, ids, rewards: rewards}

    def starts(collected):
        """Return the two starts [2,P,...] of every prompt."""
        batch = collected.transitions
        first = batch.select((batch.timesteps == sampler.ladder.timesteps[0]).nonzero().squeeze(1))
        return first.xt.transpose(0, 1) if first.xt.shape[1] == 2 else first.xt.unflatten(0, (2, -1)).squeeze(2)

    pairs, singles = TrajectoryPairs(**common), Trajectories(**common, **worth)
    apart = TrajectoryPairs(**common, shared_noise=False)(prompts, 0)
    together = Trajectories(**common, **worth, shared_noise=True)(prompts, 0)
    for collected in (pairs(prompts, 0), together):  # D3PO's own way, and DDPO told to
        assert torch.equal(*starts(collected))
    for collected in (apart, singles(prompts, 0)):
        assert not torch.isclose(*starts(collected)).all(dim=(1, 2, 3)).any()
    # The first trajectory is the same in both, and so are the log-probabilities of its steps.
    first, alone = (found.transitions.select(torch.arange(9)) for found in (together, singles(prompts, 0)))
    assert torch.equal(first.x_prev, alone.x_prev)
    assert torch.equal(first.behavior_log_prob, alone.behavior_log_prob)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_old_and_new_log_probability_are_equal_at_equal_weights(backbone, make_sampler, prompts, dtype):
    sampler = make_sampler(num_inference_steps=4, storage_dtype=dtype)
    how = Trajectories(
        sampler=sampler, scorer=Brightness(), samples_per_prompt=2, advantages=lambda texts, ids, rewards: rewards
    )
    rollout = how(prompts, step=0)
    batch = rollout.transitions
    assert torch.equal(batch.x_prev, batch.x_prev.to(dtype).float())
    xt, timesteps, prompt = batch.starts()
    network = FrozenDenoiser(backbone.denoiser, backbone.predict)
    pred = guided(network, xt, timesteps, rollout.cond.select(prompt), rollout.empty, 5.0)
    found = transition_likelihoods(backbone.path, batch, pred, None, eta=1.0)
    torch.testing.assert_close(found.log_prob_w, batch.behavior_log_prob, rtol=0, atol=2e-5)


def test_a_rollout_of_a_prompt_depends_on_nothing_else(backbone, make_sampler, prompts):
    how = StepPairs(sampler=make_sampler(num_inference_steps=4), scorer=Brightness(), divert_start_step=1)
    together = how(prompts, step=2).transitions
    order = [2, 0]
    alone = how(PromptEncoder(backbone, 64)([TEXTS[i] for i in order], torch.device("cpu")), step=2).transitions
    for place, original in enumerate(order):
        a = together.select((together.prompt == original).nonzero().squeeze(1))
        b = alone.select((alone.prompt == place).nonzero().squeeze(1))
        torch.testing.assert_close(a.x_prev, b.x_prev, rtol=1e-4, atol=1e-4)
    other = how(prompts, step=3).transitions
    assert not torch.allclose(other.xt, together.xt)


def test_rollouts_leave_the_network_in_training_mode_and_without_gradient(backbone, make_sampler, prompts):
    batch = StepPairs(sampler=make_sampler(num_inference_steps=4), scorer=Brightness(), divert_start_step=3)(prompts, 0)
    assert backbone.denoiser.training
    assert not batch.transitions.xt.requires_grad


def test_the_empty_prompt_is_that_of_the_pipeline(backbone):
    batch = PromptEncoder(backbone, 64)(["a red circle"], torch.device("cpu"))
    assert isinstance(batch.empty, Conditioning)
    assert not batch.empty["prompt_embeds"].any()
    assert not batch.empty["pooled_prompt_embeds"].any()
    assert batch.empty["add_time_ids"].tolist() == [[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]


def test_impossible_rollouts_are_refused(make_sampler):
    sampler = make_sampler(num_inference_steps=4)
    with pytest.raises(ConfigError, match="divert_start_step 4"):
        StepPairs(sampler=sampler, scorer=Brightness(), divert_start_step=4)
    with pytest.raises(ConfigError, match="samples_per_prompt >= 2"):
        TrajectoryPairs(sampler=sampler, scorer=Brightness(), samples_per_prompt=1)


PURE_NOISE = DDPMPath.from_config(
    {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
)


@pytest.mark.parametrize("reads_prediction", [True, False])
def test_rollouts_from_pure_noise_are_finite(make_sampler, prompts, reads_prediction):
    sampler, scorer = make_sampler(path=PURE_NOISE, num_inference_steps=4), Brightness(reads_prediction)
    batch = StepPairs(sampler=sampler, scorer=scorer, divert_start_step=0, threshold=0.0)(prompts, 0).transitions
    assert batch.timesteps.tolist() == [level for level in (999, 749, 499, 249) for _ in range(len(prompts))]
    assert scorer.timesteps == [749, 499, 249, 0]
    assert_follows(batch, sampler)
    trajectories = Trajectories(sampler=sampler, scorer=Brightness(), advantages=lambda texts, ids, rewards: rewards)
    singles = trajectories(prompts, 0).transitions
    for tensor in (batch.xt, batch.x_prev, singles.x_prev, singles.advantages, singles.behavior_log_prob):
        assert tensor.isfinite().all()
        assert tensor.abs().max() < 100


def test_a_judge_is_not_told_that_candidates_are_pure_noise(make_sampler):
    how = {"scorer": Brightness(reads_prediction=False), "timesteps_of": "current"}
    sampler = make_sampler(path=PURE_NOISE, num_inference_steps=4)
    with pytest.raises(ConfigError, match=r'ends in pure noise.*Use "candidate", or divert_start_step 1'):
        StepPairs(sampler=sampler, divert_start_step=0, **how)
    StepPairs(sampler=sampler, divert_start_step=1, **how)
    StepPairs(sampler=make_sampler(num_inference_steps=4), divert_start_step=0, **how)
