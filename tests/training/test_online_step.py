"""Which transitions an optimizer step takes of a rollout, and what they count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from diffalign.data import PairSampler
from diffalign.data.visits import key_of
from diffalign.denoising import FrozenDenoiser, Rollout, TransitionBatch, normal
from diffalign.denoising.paths import DDPMPath
from diffalign.errors import ConfigError
from diffalign.objectives import Transitions, load
from diffalign.training import preference_metrics
from diffalign.training.online_step import OnlineStep, TransitionOrder

PROMPTS, ROWS = 3, 8


class Nothing:
    """Conditioning of N that says nothing."""

    def select(self, rows):
        return self


class Backbone:
    """Predict a multiple of the latent."""

    path = DDPMPath.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})

    def predict(self, denoiser, xt, timesteps, cond):
        return denoiser.weight * xt


def rollout(kept):
    """Return a rollout of three prompts with eight pairs each, of which `kept` [3,8] are kept."""
    count = PROMPTS * ROWS
    ids = torch.arange(count)
    return Rollout(
        transitions=TransitionBatch(
            xt=normal(0, 0, ids, (1, 2, 2, 2), "xt"),
            x_prev=normal(0, 0, ids, (2, 2, 2, 2), "x_prev"),
            timesteps=torch.full((count,), 501),
            previous=torch.full((count,), 451),
            prompt=torch.arange(PROMPTS).repeat_interleave(ROWS),
            kept=kept.flatten(),
        ),
        prompt_ids=torch.arange(PROMPTS),
        cond=Nothing(),
        empty=Nothing(),
        reward=torch.arange(PROMPTS).float(),
    )


def step_of(kept, updates=1, seed=0):
    """Return an OnlineStep over such a rollout, and a policy."""
    policy = nn.Linear(1, 1, bias=False)
    nn.init.constant_(policy.weight, 0.5)
    order = TransitionOrder(PairSampler(PROMPTS, seed=0), ROWS, updates)
    reference = FrozenDenoiser(nn.Identity(), lambda denoiser, xt, timesteps, cond: 0.49 * xt)
    objective = load("spo", ratio_clip=0.9)
    return (
        OnlineStep(
            backbone=Backbone(), objective=objective, reference=reference, collect=lambda prompts, step: rollout(kept),
            order=order, seed=seed, guidance_scale=1.0,
        ),
        policy,
    )  # fmt: skip


def mixed():
    """Return which pairs are kept: none of the first prompt, four of the second, all of the third."""
    return torch.stack([torch.zeros(8), torch.tensor([1, 0] * 4), torch.ones(8)]).bool()


def test_the_mean_is_over_kept_pairs_however_they_are_batched():
    step, policy = step_of(mixed())
    indices = step.order.indices(0, PROMPTS * ROWS)
    assert sorted(indices) == list(range(PROMPTS * ROWS))
    step.before_step(indices, 0)
    whole, metrics = step(policy, indices, 0)
    assert metrics["kept"].sum() == 12
    assert (whole != 0).sum() == 12
    assert torch.allclose(whole.mean(), metrics["loss"].mean())
    parts = [step(policy, indices[start : start + 4], 0)[0] for start in range(0, len(indices), 4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    shuffled = [indices[place] for place in torch.randperm(len(indices)).tolist()]
    torch.testing.assert_close(step(policy, shuffled, 0)[0].mean(), whole.mean())


def test_a_batch_without_kept_pairs_still_has_a_gradient_of_zero():
    step, policy = step_of(torch.zeros(PROMPTS, ROWS).bool())
    indices = step.order.indices(0, PROMPTS * ROWS)
    step.before_step(indices, 0)
    loss, _ = step(policy, indices[:4], 0)
    loss.mean().backward()
    assert policy.weight.grad.item() == 0


def test_updates_share_a_rollout_and_its_kept_pairs():
    step, policy = step_of(mixed(), updates=4)
    seen, kept = [], []
    for number in range(4):
        indices = step.order.indices(number * 6, 6)
        step.before_step(indices, number)
        _, metrics = step(policy, indices, number)
        seen += indices
        kept.append(int(metrics["kept"].sum()))
    assert sorted(seen) == list(range(PROMPTS * ROWS))
    assert kept == [3, 3, 3, 3]


def test_the_order_goes_through_the_prompts():
    order = TransitionOrder(PairSampler(10, seed=1), slots=6, updates=3)
    steps = [order.indices(number * 10, 10) for number in range(6)]
    prompts = [sorted({index // 6 for index in indices}) for indices in steps]
    assert prompts[0] == prompts[1] == prompts[2]
    assert sorted(prompts[0] + prompts[3]) == list(range(10))
    assert len({index for indices in steps for index in indices}) == 60


def test_orders_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="must divide the 5 transitions"):
        TransitionOrder(PairSampler(10, seed=1), slots=5, updates=2)
    with pytest.raises(ConfigError, match="no multiple of the 3"):
        TransitionOrder(PairSampler(10, seed=1), slots=3).indices(0, 4)
    with pytest.raises(ConfigError, match="takes 4 prompts, there are 3"):
        TransitionOrder(PairSampler(3, seed=1), slots=1).indices(0, 4)


def test_a_prompt_that_comes_again_in_a_rollout_is_sampled_anew():
    """At the end of an epoch, and where a file says a prompt twice; all updates of a rollout see the same."""
    order = TransitionOrder(PairSampler(3, seed=1), slots=2, ids=np.array([7, 8, 7]))
    first = [key_of(index) for index in order.indices(0, 6)]
    assert len(set(first)) == 6
    assert sum(draw == 1 for _, draw in first) == 2
    across = [key_of(index) for index in TransitionOrder(PairSampler(3, seed=1), slots=1).indices(2, 2)]
    assert len(set(across)) == 2
    halves = TransitionOrder(PairSampler(3, seed=1), slots=2, updates=2, ids=np.array([7, 8, 7]))
    assert sorted(key_of(index) for start in (0, 3) for index in halves.indices(start, 3)) == sorted(first)


def test_the_rows_of_a_prompt_are_told_apart_by_its_draws():
    """Two visits of one prompt are two prompts of the rollout, each with its own transitions."""
    step, policy, _ = again()
    indices = step.order.indices(0, 2 * ROWS)
    step.before_step(indices, 0)
    rows = {step._rows[key_of(index)] for index in indices}
    assert len(rows) == 2 * ROWS
    losses, metrics = step(policy, indices, 0)
    assert len(losses) == 2 * ROWS
    assert sorted(metrics["reward"].unique().tolist()) == [0, 1]


def again():
    """Return a step whose rollouts have two visits of one prompt, its policy, and the prompts that were asked for."""
    step, policy = step_of(torch.ones(PROMPTS, ROWS, dtype=torch.bool))
    step.order = TransitionOrder(PairSampler(2, seed=0), ROWS, ids=np.array([7, 7]))
    asked, collect = [], step.collect
    step.collect = lambda prompts, at: (asked.append([key_of(prompt) for prompt in prompts]), collect(prompts, at))[1]
    return step, policy, asked


def test_pairs_tell_how_far_the_policy_is_from_the_reference():
    step, policy = step_of(torch.ones(PROMPTS, ROWS).bool())
    indices = step.order.indices(0, PROMPTS * ROWS)
    step.before_step(indices, 0)
    _, metrics = step(policy, indices, 0)
    ratios = torch.stack([metrics["chosen_ratio"], metrics["rejected_ratio"]])
    torch.testing.assert_close(metrics["approx_kl"], 0.5 * ratios.log().square().mean(0))
    assert metrics["approx_kl"].min() > 0
    assert not metrics["clip_fraction"].any()
    narrow = replace(step, objective=load("spo", ratio_clip=1e-6))
    narrow.before_step(indices, 0)
    assert narrow(policy, indices, 0)[1]["clip_fraction"].min() > 0


@pytest.mark.parametrize("name", ["ddpo", "dpok"])
def test_single_transitions_tell_how_far_the_policy_is_from_what_sampled(name):
    log_prob, sampled = torch.tensor([-0.3, -0.3, -0.3]), torch.tensor([-0.3, -0.3005, -0.35])
    errors = Transitions(log_prob_w=log_prob, behavior_log_prob=sampled, advantages=torch.ones(3), drift=torch.zeros(3))
    metrics = preference_metrics.of(errors, load(name, clip_range=1e-3))
    assert metrics["clip_fraction"].tolist() == [0.0, 0.0, 1.0]
    expected = torch.tensor([0.0, 0.5 * 0.0005**2, 0.5 * 0.05**2])
    torch.testing.assert_close(metrics["approx_kl"], expected, atol=1e-8, rtol=1e-3)
