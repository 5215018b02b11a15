"""Who judges what a run draws: reward models of pictures, or LPO's of noisy latents."""

from pathlib import Path
from typing import Any

import torch

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.errors import ConfigError
from diffalign.jobs.scoring import scorers
from diffalign.rollout import LatentReward, PictureScorer, Sampler, StepScorer, WinnerGuidance

LATENT_REWARD = "lrm"  # how rollout.scorer calls a judge of noisy latents


def judge(config: Config, backbone: Backbone, device: torch.device, sampler: Sampler) -> StepScorer:
    """Load what judges: reward models of decoded pictures, or LPO's of noisy latents."""
    place = latent_reward_place(config)
    if place is None:
        judges = load_scorers(config, device)
        return PictureScorer(backbone, judges, config.rollout.decode_batch_size, sampler.evaluations)
    return LatentReward.load(place, backbone, device, config.data.resolution, config.rollout.sample_batch_size)


def latent_reward_place(config: Config) -> Path | None:
    """Return the folder that rollout.scorer lrm=FOLDER names; None for reward models of pictures.

    Raises:
        ConfigError: lrm without a folder, which is not downloaded, or for other examples than step pairs.
    """
    what = f"LPO's reward model: {LATENT_REWARD}=FOLDER, e.g. assets/tiny-lrm, or a download of lrm_15 of casiatao/LRM."
    place = scorers.folder(config.rollout.scorer, LATENT_REWARD, what)
    if place is not None and config.collect != "step_pairs":
        raise ConfigError(
            f"rollout.scorer {LATENT_REWARD} reads noisy latents: it is for step_pairs, not {config.collect}."
        )
    return place


def load_scorers(config: Config, device: torch.device) -> list[Any]:
    """Load the reward models that judge. Raises ConfigError as `check` does."""
    check(config)
    return scorers.load(config.rollout.scorer, str(device))


def check(config: Config) -> None:
    """Refuse reward models that cannot judge this run, before any is loaded.

    Raises:
        ConfigError: the oracle, which is for measuring; or several where one is needed.
        UserError: one that does not exist.
    """
    names = scorers.parse(config.rollout.scorer)
    if scorers.ORACLE in names:
        raise ConfigError(
            "The oracle measures what training did and must not be trained on. Use a reward model, e.g. "
            "rollout.scorer=pickscore=assets/tiny-pickscore."
        )
    if len(names) > 1 and config.collect != "trajectory_pairs":
        raise ConfigError(
            f"{config.collect} needs one reward model, got {', '.join(names)}. Name one in rollout.scorer, or use a "
            "weighted sum of several."
        )


def guidance(config: Config, sampler: Sampler, scorer: StepScorer) -> WinnerGuidance | None:
    """Return what moves the winners of step pairs, if anything does."""
    zeta, schedule = config.rollout.winner_guidance, config.rollout.winner_guidance_schedule
    return WinnerGuidance(sampler=sampler, scorer=scorer, zeta=zeta, schedule=schedule) if zeta else None
