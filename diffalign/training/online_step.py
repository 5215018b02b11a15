"""Learning from what the policy itself samples: rollouts before an optimizer step, transitions within it."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffalign import denoising
from diffalign.backbones.base import Backbone
from diffalign.data import PairSampler
from diffalign.data.visits import DistinctDraws, key_of, moved
from diffalign.denoising import FrozenDenoiser, Rollout
from diffalign.errors import ConfigError
from diffalign.objectives.base import Objective
from diffalign.training import preference_metrics
from diffalign.training.hooks import StepHook


@dataclass(frozen=True)
class TransitionOrder:
    """Say which transitions come next: example p * slots + s is the s-th transition of prompt p.

    A rollout serves `updates` optimizer steps, each with slots / updates transitions of every prompt. A prompt that
    comes again in a rollout is a `Visit`: it is sampled anew.

    Args:
        prompts: the order of the prompts.
        slots: transitions used of a prompt's rollout, a multiple of `updates`.
        updates: optimizer steps a rollout serves.
        ids: [P], equal where prompts are the same; None: each is another.

    Raises:
        ConfigError: slots is no multiple of updates.
    """

    prompts: PairSampler
    slots: int
    updates: int = 1
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.slots % self.updates:
            raise ConfigError(
                f"rollout.updates {self.updates} must divide the {self.slots} transitions of a prompt. Set "
                "rollout.transitions_per_prompt to a multiple of it."
            )

    @property
    def slots_per_update(self) -> int:
        """Return how many transitions of a prompt one optimizer step sees."""
        return self.slots // self.updates

    def indices(self, position: int, count: int) -> list[int]:
        """Return the examples of the optimizer step that starts at `position`; `count` is its size.

        Raises:
            ConfigError: count is no multiple of `slots_per_update`.
        """
        share = self.slots_per_update
        if count % share:
            raise ConfigError(
                f"An optimizer step of {count} transitions is no multiple of the {share} it takes of each prompt. "
                "Change train.global_batch_size or train_batch_size, rollout.transitions_per_prompt or rollout.updates."
            )
        if count // share > self.prompts.num_examples:
            raise ConfigError(
                f"An optimizer step takes {count // share} prompts, there are {self.prompts.num_examples}. Take more "
                "of each: raise rollout.transitions_per_prompt, or of trajectories rollout.samples_per_prompt."
            )
        rollout, part = divmod(position // count, self.updates)
        drawn = DistinctDraws(self.prompts, self.ids).indices(rollout * (count // share), count // share)
        first = part * share
        return [moved(prompt, prompt * self.slots + first + slot) for prompt in drawn for slot in range(share)]


@dataclass(kw_only=True)
class OnlineStep(StepHook):
    """Compute the loss [B] and the metrics of B transitions under a policy.

    Pairs too close to call have a loss of 0, and the others count more, so that the mean over the global batch is that
    over the kept pairs of all processes.

    Args:
        collect: samples for prompts (by position in the data, as `order` serves them) with the policy as it is, at an
            optimizer step.
        order: which example is which transition.
        grad_scale: of GradSPO's likelihood; None: the Gaussians of the steps.
        behavior: what samples, if that is not the policy itself: told of every step and saved.
        state: what `collect` keeps between steps, with state_dict and load_state_dict; None: nothing.
        reduce: averages a tensor over processes.
    """

    backbone: Backbone
    objective: Objective
    reference: FrozenDenoiser | None
    collect: Callable[[list[int], int], Rollout]
    order: TransitionOrder
    seed: int
    guidance_scale: float = 5.0
    eta: float = 1.0
    grad_scale: float | None = None
    behavior: StepHook | None = None
    state: Any = None
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    auto_beta: None = None  # for pairs of given images only

    def __post_init__(self) -> None:
        self._rollout: Rollout | None = None
        self._rows: dict[tuple[int, int], int] = {}  # row of the transitions by the key of an example
        self._weight = 0.0  # of a kept example: examples / kept ones, over all processes

    def before_step(self, indices: list[int], step: int) -> None:
        """Sample if the last rollout has served its updates; weigh the examples of this step."""
        if step % self.order.updates == 0:
            shown = [moved(index, index // self.order.slots) for index in indices]
            prompts = list({key_of(prompt): prompt for prompt in shown}.values())
            self._rollout = self.collect(prompts, step)
            self._rows = self._ordered_rows(prompts, step)
        assert self._rollout is not None, "a run starts and resumes where a rollout does"
        kept = self._rollout.transitions.kept[[self._rows[key_of(index)] for index in indices]]
        share = self.reduce(kept.float().mean()).item()
        self._weight = 1 / share if share else 0.0

    def __call__(self, policy: nn.Module, indices: list[int], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return losses [B] with gradient and detached metrics of the examples at `indices`."""
        assert self._rollout is not None, "before_step comes first"
        rows = torch.tensor([self._rows[key_of(index)] for index in indices], device=self._rollout.prompt_ids.device)
        every = self._rollout.transitions
        kept = every.kept[rows]
        # Every process needs a backward pass; where nothing is kept, one example stands in with a loss of 0.
        used = kept if kept.any() else torch.arange(len(rows), device=rows.device) == 0
        batch = every.select(rows[used])
        errors = self._likelihoods(policy, batch)
        loss = self.objective.loss(errors)
        metrics = {"loss": loss.detach(), **preference_metrics.of(errors, self.objective)}
        metrics |= {"kept": kept.float(), "reward": self._rollout.reward[every.prompt[rows]]}
        weighted = torch.zeros(len(rows), device=loss.device, dtype=loss.dtype)
        return weighted.index_put((used.nonzero().squeeze(1),), loss * kept[used] * self._weight), metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what the rollouts keep."""
        return {} if self.state is None else self.state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what the rollouts kept."""
        if self.state is not None:
            self.state.load_state_dict(state)

    def _likelihoods(self, policy: nn.Module, batch: denoising.TransitionBatch) -> Any:
        """Evaluate the networks, the reference first: the peak of memory is that of the policy alone."""
        assert self._rollout is not None
        xt, timesteps, prompt = batch.starts()
        where = xt, timesteps, self._rollout.cond.select(prompt), self._rollout.empty, self.guidance_scale
        reference, prefix = None, nullcontext()
        if self.reference is not None:
            reference = denoising.guided(partial(self.reference, share=True), *where)
            prefix = self.reference.shared()
        with prefix:
            pred = denoising.guided(partial(self.backbone.predict, policy), *where)
        return denoising.transition_likelihoods(self.backbone.path, batch, pred, reference, self.eta, self.grad_scale)

    def _ordered_rows(self, prompts: list[int], step: int) -> dict[tuple[int, int], int]:
        """Return the row of every example: of each prompt its rows in a random order, kept ones first."""
        assert self._rollout is not None
        batch, ids = self._rollout.transitions, self._rollout.prompt_ids
        places = {place: (batch.prompt == place).nonzero().squeeze(1) for place in range(len(prompts))}
        most = max(len(rows) for rows in places.values())
        draws = denoising.normal(self.seed, step, ids, (most,), stream="transition_order")
        found = {}
        for place, prompt in enumerate(prompts):
            rows = places[place]
            order = (draws[place, : len(rows)] + 1e3 * ~batch.kept[rows]).argsort()
            for rank, row in enumerate(rows[order][: self.order.slots].tolist()):
                turn, update = divmod(rank, self.order.updates)  # every update gets its share of the kept ones
                example = prompt * self.order.slots + update * self.order.slots_per_update + turn
                found[key_of(moved(prompt, example))] = row
        return found
