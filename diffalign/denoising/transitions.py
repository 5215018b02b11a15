"""Denoising transitions x_t -> x_p that a sampler took, and how likely a network finds them."""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffalign.denoising.ddim import ddim_step
from diffalign.denoising.paths import NoisePath, to_epsilon
from diffalign.objectives.base import Transitions


@dataclass(frozen=True, kw_only=True, eq=False)
class TransitionBatch:
    """Hold N examples: pairs of transitions, the preferred one first, or single transitions."""

    xt: Tensor  # [N,m,C,H,W], m = 1 where both transitions of a pair start from one latent
    x_prev: Tensor  # [N,k,C,H,W], k = 2 for pairs, as they were stored
    timesteps: Tensor  # [N] int64
    previous: Tensor  # [N] int64
    prompt: Tensor  # [N] int64, position among the prompts of the rollout
    kept: Tensor  # [N] bool, False for pairs that were too close to learn from
    label: Tensor | None = None  # [N], 1 where the first transition is preferred, 0 for a tie
    advantages: Tensor | None = None  # [N]
    behavior_log_prob: Tensor | None = None  # [N], of single transitions under the network that took them
    behavior_pred: Tensor | None = None  # [N,C,H,W], what that network predicted at xt, if it is wanted

    def __len__(self) -> int:
        return len(self.timesteps)

    def select(self, rows: Tensor) -> "TransitionBatch":
        """Return some of the examples."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor[rows] for name, tensor in tensors.items() if tensor is not None})

    @classmethod
    def cat(cls, batches: list["TransitionBatch"]) -> "TransitionBatch":
        """Concatenate batches of one kind."""
        columns = {field.name: [getattr(batch, field.name) for batch in batches] for field in fields(cls)}
        return cls(**{name: None if parts[0] is None else torch.cat(parts) for name, parts in columns.items()})

    def starts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what networks are evaluated at: latents [m*N,...], timesteps [m*N], prompt positions [m*N]."""
        count = self.xt.shape[1]
        return self.xt.transpose(0, 1).flatten(0, 1), self.timesteps.repeat(count), self.prompt.repeat(count)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """Hold what sampling for P prompts gave."""

    transitions: TransitionBatch
    prompt_ids: Tensor  # [P] int64
    cond: Any  # conditioning of the prompts
    empty: Any  # conditioning of the empty prompt
    reward: Tensor  # [P], mean score of the finished pictures


def transition_likelihoods(
    path: NoisePath,
    batch: TransitionBatch,
    policy: Tensor,
    reference: Tensor | None,
    eta: float,
    grad_scale: float | None = None,
) -> Transitions:
    """Return the log-probabilities of N examples from predictions [m*N,...] at `batch.starts()`.

    Winner and loser that share their latent share the prediction, so a network is evaluated once a pair.

    Args:
        grad_scale: not the Gaussians of the steps, but GradSPO's score matching with this scale; pairs from one latent.
    """
    log_probs = _log_probs if grad_scale is None else partial(_score_matching, grad_scale=grad_scale)
    of_policy, of_reference = (
        None if pred is None else log_probs(path, batch, pred, eta) for pred in (policy, reference)
    )
    pairs = batch.x_prev.shape[1] == 2
    return Transitions(
        log_prob_w=of_policy[0],
        log_prob_l=of_policy[1] if pairs else None,
        reference_log_prob_w=None if of_reference is None else of_reference[0],
        reference_log_prob_l=of_reference[1] if pairs and of_reference is not None else None,
        label=batch.label,
        advantages=batch.advantages,
        behavior_log_prob=batch.behavior_log_prob,
        drift=None if pairs or reference is None else _drift(policy, reference),
    )


def _drift(policy: Tensor, reference: Tensor) -> Tensor:
    """Return the mean over C, H, W of (policy - reference)^2 [N] (DPOK).

    Predictions are compared as they are, eps or v: in eps, a v model could leave the reference freely at pure noise,
    where the noise is known whatever is predicted (eps = alpha v + sigma xt), and the picture is not.
    """
    return (policy.float() - reference.detach().float()).square().flatten(1).mean(1)


def score_matching(eps: Tensor, behavior: Tensor, shift: Tensor) -> list[Tensor]:
    """Return GradSPO's log-likelihoods of winner and loser, [N] each: -mean (eps - (behavior -+ shift))^2.

    `shift` is grad_scale * sqrt(1 - abar_t) * (z_w - z_l) / 2: along the noise that made the winner better. There is no
    1/std^2, which lets the last steps dominate the Gaussians. At pure noise the score does not depend on what a v model
    predicts, and such a step teaches nothing.
    """
    targets = behavior - shift, behavior + shift
    return [-(eps - target.detach()).square().flatten(1).mean(1) for target in targets]


def _score_matching(
    path: NoisePath, batch: TransitionBatch, pred: Tensor, eta: float, grad_scale: float
) -> list[Tensor]:
    assert batch.behavior_pred is not None, "score matching needs the predictions of the network that sampled"
    assert batch.xt.shape[1] == 1, "score matching is for pairs from one latent"
    xt, timesteps, _ = batch.starts()
    std = ddim_step(path, xt, pred.detach(), timesteps, batch.previous, eta).std
    _, sigma = path.alpha_sigma(timesteps)
    # x_w - x_l = std * (z_w - z_l)
    factor = (grad_scale * sigma / (2 * std)).view(-1, *(1 for _ in xt.shape[1:]))
    shift = factor * (batch.x_prev[:, 0] - batch.x_prev[:, 1])
    eps, behavior = (to_epsilon(path, xt, part, timesteps) for part in (pred, batch.behavior_pred))
    return score_matching(eps, behavior, shift)


def _log_probs(path: NoisePath, batch: TransitionBatch, pred: Tensor, eta: float) -> list[Tensor]:
    """Return log p(x_p | x_t) [N] of each transition of an example."""
    xt, timesteps, _ = batch.starts()
    previous = batch.previous.repeat(batch.xt.shape[1])
    steps = ddim_step(path, xt, pred, timesteps, previous, eta)
    rows = torch.arange(len(batch), device=xt.device)
    starts = batch.xt.shape[1]
    return [
        steps.select(rows + min(k, starts - 1) * len(batch)).log_prob(x_prev)
        for k, x_prev in enumerate(batch.x_prev.unbind(1))
    ]
