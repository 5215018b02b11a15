"""`diffalign shapes build`: make every asset of the embedded world again, from seeds alone.

assets/tiny-sdxl        the base model                          diffalign/shapes/{autoencoder,pretraining}.py
assets/prompts          training captions and held-out prompts
assets/tiny-pairs       preference pairs in Pick-a-Pic v2's columns: samples of the base and of two models that are
                        not shipped, an early and a stronger one (build/generators)
assets/tiny-pickscore, assets/tiny-hpsv2    reward models in the official formats, trained on pairs of the world
assets/tiny-lists       four such samples a prompt, each with the scores of three judges
assets/tiny-step-aware  the tiny PickScore, taught to judge one-step predictions of the base model (SPO)
assets/tiny-lrm         the base model's encoder, taught to judge its noisy latents (LPO)

The flow model shares the prompts and the reward models (`--model sd3`):

assets/tiny-sd3         a `StableDiffusion3Pipeline`                       diffalign/shapes/sd3.py
assets/tiny-sd3-pairs, assets/tiny-sd3-lists    pairs and lists of such samples
"""

import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from diffusers import DiffusionPipeline
from rich.console import Console

import reward_models
from diffalign.backbones import loading
from diffalign.errors import ConfigError
from diffalign.jobs.rewards import reward
from diffalign.jobs.world.world_data import World, write_captions, write_lists, write_pairs
from diffalign.progress import progress_bar
from diffalign.rollout import LatentReward
from diffalign.shapes import render
from diffalign.shapes.captions import PALETTE, SHAPES, Scene, distinct_captions, scenes
from diffalign.shapes.models import MODELS
from diffalign.shapes.pretraining import pretrain
from diffalign.shapes.recipe import Pretraining
from diffalign.shapes.tokenizer import world_merges
from reward_models import tiny, tokenization, training

VALIDATION_PAIRS = 1000  # rendered, of held-out combinations; the best step of a reward model is chosen on them
PARTS = {
    "sdxl": ("pipeline", "prompts", "pairs", "captions", "rewards", "lists", "step-aware", "lrm"),
    "sd3": ("pipeline", "pairs", "captions", "lists"),
}


def build(assets: Path, parts: list[str], world: World, pretraining: Pretraining, console: Console) -> None:
    """Build the named parts of a model's world, in order.

    Raises:
        ConfigError: an unknown part.
    """
    known = PARTS[world.model]
    if unknown := [part for part in parts if part not in known]:
        raise ConfigError(f'Unknown part "{unknown[0]}" of the world of {world.base}. Available: {", ".join(known)}.')
    makers: dict[str, Callable[[], Any]] = {
        "pipeline": lambda: build_base(assets, world, pretraining, console),
        "prompts": lambda: write_prompts(assets / "prompts", world),
        "pairs": lambda: write_pairs(assets, world, console),
        "captions": lambda: write_captions(assets, world),
        "rewards": lambda: build_rewards(assets, world, console),
        "lists": lambda: write_lists(assets, world, console),
        "step-aware": lambda: build_step_aware(assets, world, console),
        "lrm": lambda: build_lrm(assets, world, console),
    }
    for part in known:
        if part in parts:
            console.rule(part)
            makers[part]()


def build_base(assets: Path, world: World, recipe: Pretraining, console: Console) -> None:
    """Train the base model and save it as a diffusers folder in float16."""
    pipeline = MODELS[world.model].build(recipe.seed)
    errors = pretrain(pipeline, recipe, console, lambda kind: save_base(pipeline, world.model_folder(assets, kind)))
    console.print(errors)


def save_base(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save in float16 safetensors, under the plain file names, to be loaded in float32 by those who name no dtype.

    diffusers does so for the UNet and the VAE; transformers takes the dtype that the encoder's config names. The
    pipeline goes on as it was saved, in float32.
    """
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    for file in folder.glob("text_encoder*/config.json"):
        settings = json.loads(file.read_text(encoding="utf8")) | {"dtype": "float32"}
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf8")
    pipeline.to(torch.float32)


def write_prompts(folder: Path, world: World) -> None:
    """Write the training captions and the held-out prompts, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = {
        "tiny-train.txt": distinct_captions(world.seed + 1, world.training_captions, held_out=False),
        "tiny-held-out.txt": distinct_captions(world.seed + 2, world.held_out_prompts, held_out=True),
    }
    for name, captions in lists.items():
        (folder / name).write_text("\n".join(captions) + "\n", encoding="utf8")


def build_rewards(assets: Path, world: World, console: Console) -> None:
    """Train tiny PickScore and HPSv2 models with the project's own reward training, in their official formats."""
    pairs = reward_pairs(assets, world)
    held_out = rendered_pairs(VALIDATION_PAIRS, world.seed + 5, held_out=True)
    common = {"batch_size": 64, "max_steps": world.reward_steps, "warmup_steps": 50, "learning_rate": 5e-4}
    common |= {"eval_every": 200, "weight_decay": 0.05, "schedule": "cosine"}
    recipes = {
        # A CLIP from nothing first has to learn what words mean: PickScore's in-batch option provides that.
        "pickscore": replace(training.PICKSCORE, in_batch_negatives=True, seed=world.seed, **common),
        "hpsv2": replace(
            training.PICKSCORE, in_batch_negatives=True, max_logit_scale=100.0, seed=world.seed + 1, **common
        ),
    }
    with tempfile.TemporaryDirectory() as scratch:
        words = tokenization.write_hf_tokenizer(Path(scratch) / "tokenizer", world_merges(), text_length=32)
        merges = tokenization.write_bpe_file(Path(scratch) / "bpe.txt.gz", world_merges())
        makers = {
            "pickscore": lambda folder: tiny.build_tiny_pickscore(folder, words, world.seed),
            "hpsv2": lambda folder: tiny.build_tiny_hpsv2(folder, merges, world.seed),
        }
        for name, recipe in recipes.items():
            folder = assets / f"tiny-{name}"
            makers[name](folder)
            scorer = reward_models.load(name, folder)
            with progress_bar(recipe.max_steps, name, console=console) as advance:
                result = training.train_reward(
                    scorer,
                    pairs,
                    recipe,
                    validation=held_out,
                    directory=folder,
                    log=lambda _, advance=advance: advance(1),
                )
            console.print(f"{name}: agrees with the oracle on {result.best_accuracy:.1%} of held-out rendered pairs")


def build_step_aware(assets: Path, world: World, console: Console) -> None:
    """Train SPO's step-aware model by `diffalign reward train` (docs/embedded-world.md has the command)."""
    changes = {"batch_size": 64, "max_steps": world.step_aware_steps, "warmup_steps": 20, "learning_rate": 2e-4}
    with tempfile.TemporaryDirectory() as scratch:
        _train_judge_of_steps("step_aware", assets, Path(scratch), world, changes, console)
        reward_models.load("step_aware", scratch, dtype=torch.float16).save(assets / "tiny-step-aware")


def build_lrm(assets: Path, world: World, console: Console) -> None:
    """Train LPO's judge of noisy latents by `diffalign reward train` (docs/embedded-world.md has the command)."""
    changes = {"batch_size": 32, "max_steps": world.lrm_steps, "warmup_steps": 10, "learning_rate": 3e-4}
    with tempfile.TemporaryDirectory() as scratch:
        _train_judge_of_steps("lrm", assets, Path(scratch), world, changes, console)
        save_half(Path(scratch), assets)


def save_half(folder: Path, assets: Path) -> None:
    """Write a judge of the embedded world's latents as assets/tiny-lrm, in float16."""
    judge = LatentReward.load(folder, loading.load(assets / "tiny-sdxl"), torch.device("cpu"), resolution=64)
    judge.module.half()
    judge.save(assets / "tiny-lrm")


def _train_judge_of_steps(
    name: str, assets: Path, out: Path, world: World, changes: dict[str, Any], console: Console
) -> None:
    """Train without validation, so that the last weights are the result."""
    changes |= {"eval_every": changes["max_steps"], "validation_fraction": 0.0, "bf16": True, "seed": world.seed}
    init = str(assets / "tiny-pickscore") if name == "step_aware" else None
    steps = reward.Steps(model=str(assets / "tiny-sdxl"), draws=4 if name == "step_aware" else None)
    reward.train(
        name, str(assets / "tiny-pairs"), out, init=init, recipe=None, changes=changes, validation=None,
        device="cpu", console=console, steps=steps,
    )  # fmt: skip


def reward_pairs(assets: Path, world: World) -> list[tuple[Any, ...]]:
    """Return training pairs for reward models: rendered right against wrong, and the base model's own pairs."""
    rows = pq.read_table(assets / "tiny-pairs" / "train.parquet").to_pylist()
    own = [(row["jpg_0"], row["jpg_1"], row["caption"], row["label_0"]) for row in rows]
    return [*rendered_pairs(world.reward_pairs, world.seed + 4, held_out=False), *own]


def rendered_pairs(number: int, seed: int, *, held_out: bool) -> list[tuple[Any, ...]]:
    """Render pairs whose second image gets one attribute of the caption wrong; the order is drawn at random."""
    rng = random.Random(seed)
    stream, pairs = scenes(seed, held_out=held_out), []
    for _ in range(number):
        scene = next(stream)
        right, wrong = render.render(scene, rng), render.render(corrupt(scene, rng), rng)
        first = rng.random() < 0.5
        pairs.append((right, wrong, scene.caption(), 1.0) if first else (wrong, right, scene.caption(), 0.0))
    return pairs


def corrupt(scene: Scene, rng: random.Random) -> Scene:
    """Change one thing that the caption of a scene mentions."""
    names = ["color", "shape", "background", "count" if scene.count > 1 else "shape"]
    names += [name for name in ("size", "position") if getattr(scene, name)] * 2
    choices = {
        "color": [name for name in PALETTE if name not in (scene.color, scene.background, "white", "gray", "black")],
        "shape": [name for name in SHAPES if name != scene.shape],
        "background": [name for name in PALETTE if name not in (scene.color, scene.background)],
        "count": [count for count in (1, 2, 3) if count != scene.count],
        "size": [{"small": "large", "large": "small"}.get(scene.size or "", "small")],
        "position": [name for name in ("left", "right", "top", "bottom") if name != scene.position],
    }
    name = rng.choice(names)
    return replace(scene, **{name: rng.choice(choices[name])})
