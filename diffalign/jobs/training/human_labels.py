"""Labels that people gave to the pictures of a rollout, for the trajectories that made them (D3PO).

`diffalign rollout` draws the pictures with the model that a run starts from, `diffalign label` collects votes on them.
The run with rollout.scorer labels=FOLDER draws the same trajectories again: noise is keyed by seed and prompt, and the
network is the reference, so no latents are stored and it does not matter when, how often or in what order it does so.
The manifests of the pictures say what they were drawn with; other weights or settings are refused.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from diffalign.backbones.base import Backbone
from diffalign.config import Config
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import Manifest
from diffalign.jobs.scoring import scorers
from diffalign.jobs.training import networks
from diffalign.labelling import read_votes

LABELS = "labels"  # how rollout.scorer calls people
VOTES = "votes.sqlite"
STEP = 0  # what the noise of these rollouts is keyed by, whichever step uses them


def place_of(config: Config) -> Path | None:
    """Return the folder that rollout.scorer labels=FOLDER names; None for reward models.

    Raises:
        ConfigError: labels without a folder.
    """
    what = f"pictures and votes: {LABELS}=FOLDER, drawn by diffalign rollout CONFIG --out FOLDER."
    return scorers.folder(config.rollout.scorer, LABELS, what)


def copies(config: Config) -> int:
    """Return how many pictures of a prompt there are to compare.

    Raises:
        ConfigError: the configuration draws no pairs of trajectories, or one picture, or its reference moves.
    """
    if config.collect != "trajectory_pairs":
        raise ConfigError(
            f'People judge finished pictures of one prompt, which "{config.objective_name}" does not compare. Use d3po.'
        )
    if config.reference.update != "fixed":
        raise ConfigError(
            "Labels are for pictures of the model that the run starts from, which reference.update "
            f'"{config.reference.update}" loses. Use fixed.'
        )
    count = config.rollout.samples_per_prompt or 2
    if count < 2:
        raise ConfigError(f"A pair needs rollout.samples_per_prompt >= 2, got {count}.")
    return count


def folder(place: Path, copy: int) -> Path:
    """Return where picture `copy` (from 0) of every prompt is."""
    return place / f"picture-{copy + 1}"


def drawn_with(config: Config, backbone: Backbone) -> tuple[dict[str, Any], str]:
    """Return settings and weights that trajectories depend on; `backbone` as it was loaded, without adapters."""
    names = ("num_inference_steps", "guidance_scale", "eta", "latent_dtype")
    settings = {name: getattr(config.rollout, name) for name in names}
    settings |= {"samples_per_prompt": copies(config), "resolution": config.data.resolution}
    settings["shared_noise"] = config.shared_noise
    settings |= {"seed": config.train.seed, "mixed_precision": config.train.mixed_precision}
    settings["pure_bf16"], settings["sampling_dtype"] = config.pure_bf16, config.performance.sampling_dtype
    settings |= networks.base_identity(config)
    return settings, f"{backbone.denoiser_fingerprint()} {backbone.fingerprint()}"


def read(config: Config, backbone: Backbone) -> dict[str, list[float]] | None:
    """Return by prompt the score of each of its pictures; None where reward models judge.

    Raises:
        DataError: the pictures are of other weights or settings, or no prompt has all of its pictures judged.
    """
    place = place_of(config)
    if place is None:
        return None
    settings, identity = drawn_with(config, backbone)
    manifest = Manifest.read(folder(place, 0))
    differs = [name for name in settings if manifest.settings.get(name) != settings[name]]
    if manifest.identity != identity:
        differs.insert(0, "model")
    if differs:
        raise DataError(
            f"The pictures in {place} were drawn with another {', '.join(differs)} than this run's: their votes say "
            "nothing about its trajectories. Use the same, or draw and label again: diffalign rollout CONFIG --out NEW."
        )
    names = [folder(place, copy).name for copy in range(settings["samples_per_prompt"])]
    scores = picture_scores(read_votes(place / VOTES)[0], names)
    if not scores:
        raise DataError(
            f"No prompt in {place / VOTES} has votes on all {len(names)} pictures. Go on with diffalign label "
            f"--votes {place / VOTES}"
        )
    return scores


def picture_scores(votes: pd.DataFrame, names: list[str]) -> dict[str, list[float]]:
    """Return by prompt the share of its comparisons that each picture won, a tie counting half.

    Prompts with a picture that nobody has judged are left out.

    Args:
        votes: a row a vote, with prompt, model_a, model_b and credit (1: a preferred).
        names: of the pictures, in the order of the scores.

    Raises:
        DataError: votes on pictures of other names.
    """
    others = sorted({*votes["model_a"], *votes["model_b"]} - set(names))
    if others:
        raise DataError(f'There are votes on "{others[0]}", expected only {", ".join(names)}. Use a file of their own.')
    sides = [
        votes[["prompt", "model_a", "credit"]].set_axis(["prompt", "picture", "won"], axis=1),
        votes[["prompt", "model_b"]].assign(won=1 - votes["credit"]).set_axis(["prompt", "picture", "won"], axis=1),
    ]
    shares = pd.concat(sides).pivot_table(index="prompt", columns="picture", values="won", aggfunc="mean")
    complete = shares.reindex(columns=names).dropna()
    return dict(zip(complete.index, complete.to_numpy().tolist(), strict=True))
