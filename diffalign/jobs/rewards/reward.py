"""`diffalign reward train` and `diffalign reward convert`: reward models of one's own."""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

import reward_models
from diffalign.backbones import inspection, loading
from diffalign.backbones.base import Backbone
from diffalign.data import RowError, open_pairs
from diffalign.data.pairs import ImageRef
from diffalign.errors import DataError, UserError, suggestion
from diffalign.jobs import skipped
from diffalign.jobs.devices import launched_processes, pick_device, together_on_cpus
from diffalign.jobs.rewards import reward_latents
from diffalign.jobs.rewards.reward_latents import NoisyLatents
from diffalign.jobs.rewards.reward_pictures import OneStepPictures
from diffalign.progress import Progress
from diffalign.rollout import LatentReward
from reward_models import training
from reward_models.base import Scorer
from reward_models.checkpoints import read_state_dict
from reward_models.hf_clip import locate
from reward_models.pairs import RewardPair
from reward_models.pal import CONFIG_FILE, Pal, PalConfig
from reward_models.step_aware import StepAware
from reward_models.training_families import Pictures

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
        resume: go on from the state in `out`.
        skip_broken: leave out unusable rows (which decodes every picture once more); otherwise stop at the first.
        root: images that the pairs name may lie in it too.

    Raises:
        UserError: a scorer that cannot be trained here, or an unknown recipe.
    """
    wanted = replace(_recipe(recipe or name), **changes)
    where, first = _place(device)
    with skipped.skippable():
        told = console if first else None
        pairs = _pairs(data, out / skipped.FILE, skip_broken, told, root)
        listed = out / f"validation_{skipped.FILE}"
        held_out = _pairs(validation, listed, skip_broken, told, root) if validation else None
    scorer, pictures = _start(name, init, pairs, steps or Steps(), wanted, out)
    scorer.to(where)
    if pictures is not None:
        pictures.to(where)
    if first:
        _tell(console, name, scorer, wanted, *training.split(pairs, held_out, wanted))
    if dry_run:
        return None
    with ExitStack() as stack:
        log = _log(stack, out, wanted, console, resume) if first else None
        result = training.train_reward(
            scorer, pairs, wanted, validation=held_out, directory=out, log=log, pictures=pictures, resume=resume
        )
    if first:
        if result.best_accuracy is None:
            scorer.save(out)  # without validation the last weights are the result
        _conclude(console, name, out, result)
    return result


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


def _log(stack: ExitStack, out: Path, recipe: training.RewardRecipe, console: Console, resume: bool) -> training.Log:
    """Return what is called after every step: it writes metrics.jsonl and moves the bar."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1), encoding="utf8")
    shown = stack.enter_context(Progress("step", recipe.max_steps, console=console))
    metrics = stack.enter_context((out / "metrics.jsonl").open("a" if resume else "w", encoding="utf8"))

    def log(record: dict[str, float]) -> None:
        metrics.write(json.dumps(record) + "\n")
        metrics.flush()
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


def _pairs(
    source: str, listed: Path, skip_broken: bool, console: Console | None, root: Path | None
) -> list[RewardPair]:
    """Return the pairs of a source, the chosen picture first; ties are dropped by the reader.

    Unusable rows raise RowError, or are left out and told to the console, if one is given.
    """
    how = {"on_error": "skip" if skip_broken else "raise", "error_log": listed if console else None}
    found = open_pairs(source, root=root, **how)
    if found.images_per_example != 2:
        raise DataError(f"{source} holds lists or single images; a reward model learns from pairs.")
    pairs = []
    for row in found:
        try:
            if skip_broken:
                for image in row.images:
                    image.load()
            user = row.extra.get("user_id")
            pairs.append(
                RewardPair(
                    _encoded(row.chosen),
                    _encoded(row.rejected),
                    row.prompt,
                    1.0 if row.preference is None else row.preference,
                    None if user is None else str(user),
                )
            )
        except RowError as error:
            found.rejects.add(error)
    if not pairs:
        raise DataError(f"{source} holds no usable pair: {found.counts}.")
    if console:
        skipped.tell(found.rejects, console)
    return pairs


def _encoded(image: ImageRef) -> Path | bytes:
    """Return where a picture is, or its bytes: it is decoded when a batch needs it."""
    return image.path or image.content
