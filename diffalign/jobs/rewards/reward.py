"""`diffalign reward train` and `diffalign reward convert`: reward models of one's own."""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

import reward_models
from diffalign.backbones import inspection, loading
from diffalign.backbones.base import Backbone
from diffalign.errors import ConfigError, UserError, suggestion
from diffalign.evaluation.manifest import atomic_write
from diffalign.folder_lock import held
from diffalign.interrupts import deferred
from diffalign.jobs import skipped
from diffalign.jobs.devices import launched_processes, pick_device, together_on_cpus
from diffalign.jobs.rewards import reward_latents
from diffalign.jobs.rewards.reward_latents import NoisyLatents
from diffalign.jobs.rewards.reward_pairs import read_pairs
from diffalign.jobs.rewards.reward_pictures import OneStepPictures
from diffalign.jobs.rewards.stored_pictures import Pictures as StoredPictures
from diffalign.jobs.rewards.stored_pictures import storing
from diffalign.progress import Progress
from diffalign.rollout import LatentReward
from diffalign.training.metrics import read as read_lines
from reward_models import training
from reward_models.base import Scorer
from reward_models.checkpoints import read_state_dict
from reward_models.hf_clip import locate
from reward_models.pairs import RewardPair
from reward_models.pal import CONFIG_FILE, Pal, PalConfig
from reward_models.step_aware import StepAware
from reward_models.training_families import Pictures
from reward_models.training_state import forget_states, is_resumable

JUDGES_OF_LATENTS = ("lrm", "lrm_sdxl")  # LPO's; both are used as rollout.scorer=lrm=FOLDER


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Say whose steps a model judges, and how what it sees of them is made (`OneStepPictures`, `NoisyLatents`)."""

    model: str | None = None  # the diffusion model
    guidance_scale: float = 5.0  # of step-aware models, as is draws
    draws: int | None = None  # (timestep, noise) a pair; None: new ones every epoch, predictions are not kept
    keep: Path | None = None  # where predictions (when `draws` is given) or clean latents are kept; None: in OUT


def train(
    name: str,
    data: str,
    out: Path,
    *,
    init: str | None,
    recipe: str | None,
    changes: dict[str, Any],
    validation: str | None,
    device: str,
    console: Console,
    steps: Steps | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    skip_broken: bool = False,
    root: Path | None = None,
) -> training.TrainingResult | None:
    """Fine-tune a scorer on preference pairs; the best weights by validation end in `out`, with a log and the recipe.

    Under `accelerate launch` every process works on its part of each batch. A dry run tells the plan and returns None.

    Args:
        name: pickscore, hpsv2, hpsv2.1, image_reward, step_aware, step_aware_sdxl, lrm, lrm_sdxl, pal or clip_score_*.
        init: weights to start from, None for the published ones. A step-aware model starts from a PickScore, PAL's
            heads from any CLIP, LPO's judge (lrm) from the diffusion model.
        recipe: the name of a scorer; None takes that of `name`.
        changes: fields of the recipe that differ from the published ones.
        steps: for models that judge steps.
        resume: go on from the state in `out`, if there is one.
        overwrite: take the place of an earlier run in `out`.
        skip_broken: leave out unusable rows (which decodes every picture once more); otherwise stop at the first.
        root: images that the pairs name may lie in it too.

    Raises:
        UserError: a scorer that cannot be trained here, an unknown recipe, or an earlier run in `out`.
        Interrupted: a signal; the step is saved.
    """
    wanted = replace(_recipe(recipe or name), **changes)
    where, first = _place(device)
    told = console if first else None
    resume = _goes_on(out, resume, overwrite, told)
    with ExitStack() as stack:
        stored = None if dry_run else _settle(stack, out, first)  # a dry run looks at no picture
        with skipped.skippable():
            pairs = read_pairs(data, out / skipped.FILE, skip_broken, stored, told, root)
            listed = out / f"validation_{skipped.FILE}"
            held_out = read_pairs(validation, listed, skip_broken, stored, told, root) if validation else None
        scorer, pictures = _start(name, init, pairs, steps or Steps(), wanted, out)
        scorer.to(where)
        if pictures is not None:
            pictures.to(where)
        if first:
            _tell(console, name, scorer, wanted, *training.split(pairs, held_out, wanted))
        if dry_run:
            return None
        log = _log(stack, out, wanted, console, overwrite) if first else None
        data = {"validation": held_out, "directory": out, "pictures": pictures}
        result = _fit(scorer, pairs, wanted, **data, log=log, say=_say(told), resume=resume)
        if first:
            if result.best_accuracy is None:
                scorer.save(out)  # without validation the last weights are the result
            _conclude(console, name, out, result)
    return result


def _settle(stack: ExitStack, out: Path, first: bool) -> StoredPictures:
    """Take the folder, and return where pictures are kept until the stack is unwound."""
    if first:
        stack.enter_context(held(out))
    return stack.enter_context(storing(out / f".pictures-{os.environ.get('RANK', '0')}"))


def _say(console: Console | None) -> Callable[[str], None]:
    return lambda said: console.print(said, markup=False, highlight=False, soft_wrap=True) if console else None


def _fit(
    scorer: Scorer | LatentReward, pairs: list[RewardPair], recipe: training.RewardRecipe, **how: Any
) -> training.TrainingResult:
    """Train; a signal is heeded after the step at work."""
    with deferred() as asked:
        try:
            return training.train_reward(scorer, pairs, recipe, **how, stopping=lambda: asked)
        except training.TrainingStopped as stopped:
            raise asked.stop(
                f"Stopped after step {stopped.step} of {recipe.max_steps}, which is saved in {how['directory']}. The "
                "same command with --resume goes on."
            ) from None


def _goes_on(out: Path, resume: bool, overwrite: bool, console: Console | None) -> bool:
    """Return whether there is something to go on with, as was asked.

    Raises:
        ConfigError: there is an earlier run, and nothing was asked about it; or both were.
    """
    if resume and overwrite:
        raise ConfigError("--resume goes on with the run in OUT, --overwrite replaces it: give one of them.")
    there = is_resumable(out)
    if there and not resume and not overwrite:
        raise ConfigError(
            f"{out} holds the state of an earlier run. Go on with that by --resume, replace it with --overwrite, or "
            "name another --out."
        )
    if resume and not there and console:
        _say(console)(f"There is nothing to resume in {out}: starting afresh.")
    return resume and there


def _recipe(name: str) -> training.RewardRecipe:
    if name not in training.RECIPES:
        raise UserError(
            f'Unknown recipe "{name}".{suggestion(name, training.RECIPES)} Available: {", ".join(training.RECIPES)}.'
        )
    return training.RECIPES[name]


def _place(device: str) -> tuple[Any, bool]:
    """Return where this process computes, and whether it is the one that writes."""
    if launched_processes() == 1:
        return pick_device(device), True
    state = PartialState(cpu=device == "cpu" or together_on_cpus())
    return state.device, state.is_main_process


def _start(
    name: str, init: str | None, pairs: list[RewardPair], steps: Steps, recipe: training.RewardRecipe, out: Path
) -> tuple[Scorer | LatentReward, Pictures | None]:
    """Return the scorer to be trained, on the CPU, and what it sees of pairs where that is not their pictures."""
    if name in JUDGES_OF_LATENTS:
        return _judge_of_latents(name, init, steps, recipe, out)
    if name.startswith("step_aware"):
        init = init or reward_models.card("pickscore").weights  # as its authors did
        has_time = any(key.startswith("t_embedder.") for key in read_state_dict(locate(init)[1]))
        card = reward_models.card(name)
        scorer = reward_models.load(name, init) if has_time else StepAware.from_clip(init, card=card)
        return scorer, _predictions(name, steps, recipe, out)
    if name == "pal" and init and not (Path(init) / CONFIG_FILE).is_file():
        users = tuple(sorted({pair.user or "all" for pair in pairs}))
        return Pal.from_clip(init, PalConfig(users=users)), None
    return reward_models.load(name, init), None


def _predictions(name: str, steps: Steps, recipe: training.RewardRecipe, out: Path) -> OneStepPictures:
    return OneStepPictures(
        _diffusion_model(name, steps),
        steps.keep or out / "predictions",
        guidance_scale=steps.guidance_scale,
        draws=steps.draws,
        seed=recipe.seed,
        bf16=recipe.bf16,
    )


def _judge_of_latents(
    name: str, init: str | None, steps: Steps, recipe: training.RewardRecipe, out: Path
) -> tuple[LatentReward, NoisyLatents]:
    if steps.draws is not None:
        raise UserError(f"{name} draws anew at every visit, which costs nothing: leave --draws out.")
    base = _diffusion_model(name, steps)
    judge = reward_latents.start(base, init, recipe.seed)
    return judge, NoisyLatents(base, steps.keep or out / "latents", judge.resolution, recipe.seed)


def _diffusion_model(name: str, steps: Steps) -> Backbone:
    if steps.model is None:
        raise UserError(f"{name} judges the steps of one diffusion model: name it, e.g. --model assets/tiny-sdxl.")
    family = inspection.family_at(steps.model)
    if not family.ddim_steps:
        raise UserError(
            f'{name} judges the latents of DDIM steps; "{steps.model}" ({family.family}) is sampled along a flow. Name '
            "a model of SD1.5, SD2.1 or SDXL."
        )
    if name in JUDGES_OF_LATENTS and family.denoiser_name != "unet":
        raise UserError(
            f'{name} is the first half of a UNet, and {family.family} ("{steps.model}") has none. Name a model '
            "of SD1.5, SD2.1 or SDXL."
        )
    return loading.load(steps.model)


def _tell(
    console: Console,
    name: str,
    scorer: Scorer | LatentReward,
    recipe: training.RewardRecipe,
    train: list,
    held_out: list,
) -> None:
    """Print what is about to happen."""
    weights = sum(parameter.numel() for parameter in scorer.module.parameters())
    epochs = recipe.max_steps * min(recipe.batch_size, len(train)) / len(train)
    lines = (
        f"{name}: {weights / 1e6:.1f} M weights from {scorer.source}",
        f"{len(train)} pairs to train on, {len(held_out)} held out, no prompt in both",
        f"{recipe.max_steps} steps of {recipe.batch_size} pairs ({epochs:.1f} epochs), loss {recipe.loss}, "
        f"learning rate {recipe.learning_rate:g} ({recipe.warmup_steps} warm-up, {recipe.schedule}), validation every "
        f"{recipe.eval_every}",
    )
    console.print("\n".join(lines), markup=False, highlight=False)


def _log(stack: ExitStack, out: Path, recipe: training.RewardRecipe, console: Console, overwrite: bool) -> training.Log:
    """Return what is called after every step: it writes metrics.jsonl and moves the bar.

    The first step it is told of says where the run goes on: later lines, of a run that died, are cut off.
    """
    out.mkdir(parents=True, exist_ok=True)
    if overwrite:
        forget_states(out)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1), encoding="utf8")
    shown = stack.enter_context(Progress("step", recipe.max_steps, console=console))
    file, started = out / "metrics.jsonl", []

    def log(record: dict[str, float]) -> None:
        if not started:
            kept = [line for line in read_lines(file) if line["step"] < record["step"]]
            with atomic_write(file) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf8")
            started.append(record["step"])
        with file.open("a", encoding="utf8") as metrics:
            metrics.write(json.dumps(record) + "\n")
        shown.reach(int(record["step"]), note=f"loss {record['loss']:.3f}")

    return log


def _conclude(console: Console, name: str, out: Path, result: training.TrainingResult) -> None:
    told = (
        "not validated" if result.best_accuracy is None else f"agrees on {result.best_accuracy:.1%} of held-out pairs"
    )
    times = ", ".join(f"t = {time}: {accuracy:.1%}" for time, accuracy in result.accuracy_at.items())
    if times:
        console.print(f"by timestep: {times}", markup=False, highlight=False)
    use = f"rollout.scorer=lrm={out}" if name in JUDGES_OF_LATENTS else f"--with {name}={out}"
    said = f"{name}: {told} (step {result.best_step}). Use it: {use}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
