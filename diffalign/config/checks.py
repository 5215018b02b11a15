"""Combinations of settings, each valid alone, that cannot work together."""

from diffalign.config.config import Config
from diffalign.errors import ConfigError
from diffalign.vocabulary import BACKPROPAGATIONS, GENERATING, INVERSIONS, NOISINGS

PREDICTIONS = frozenset({"drift", "mismatched", "behavior"})  # of Objective.needs, those that errors do not suffice for


def check(config: Config) -> None:
    """Raise ConfigError for the first impossible combination, saying what to change."""
    objective, name, needs = config.entry, config.objective_name, config.needs
    referenced = "reference" in needs
    faults = {
        f'"{name}" is noised by "{config.noising}", expected one of {", ".join(NOISINGS)}.': (
            config.noising not in NOISINGS
        ),
        f'"{name}" gives each image a caption of its own: name their columns in data.image_caption_columns, e.g. '
        "[caption_0, caption_1].": "image_captions" in needs and config.data.image_caption_columns is None,
        f'reference.update "{config.reference.update}" needs an objective with a reference, "{name}" has none. Use '
        "fixed.": config.reference.update != "fixed" and not referenced,
        f'loss.anchor_weight needs an objective with a reference, "{name}" has none. Use 0.': (
            config.loss.anchor_weight > 0 and not referenced
        ),
        f'loss.sft_weight would also learn the undesirable images of "{name}". Use 0.': (
            config.loss.sft_weight > 0 and objective.layout == "single" and not objective.chosen_only
        ),
        f'loss.auto_beta needs an objective of pairs with a reference and a beta, "{name}" is none. Use null.': (
            config.loss.auto_beta is not None
            and not (referenced and objective.layout == "pair" and "beta" in objective.hyperparameters)
        ),
        f'inversion.network "reference" needs an objective with a reference, "{name}" has none. Use policy.': (
            config.noising in INVERSIONS and config.inversion.network == "reference" and not referenced
        ),
        f'"{name}" noises a picture with what it was drawn from, which leads to no mirrored one: set '
        "data.random_flip: false.": config.noising == GENERATING and config.data.random_flip,
        f'data.positive_ratio is for objectives of labelled single images (kto); "{name}" is none. Use null.': (
            config.data.positive_ratio is not None and (objective.layout != "single" or objective.chosen_only)
        ),
        "data.positive_ratio and data.curriculum_stages both decide which example comes next. Use one.": (
            config.data.positive_ratio is not None and config.data.curriculum_stages is not None
        ),
        'performance.reference_dtype "fp8" is slower than bfloat16 unless it is compiled. Set performance.compile to '
        "regional or full.": config.performance.reference_dtype == "fp8" and config.performance.compile == "none",
        f'model.quantization "{config.model.quantization}" freezes the weights; model.tune: full trains them. Use '
        "model.tune: lora, or none.": config.model.quantization != "none" and config.model.tune == "full",
        'performance.reference_dtype "fp8" copies the base, and model.quantization is for bases too large for it. Use '
        "policy: then the first logits are 0 too.": (
            config.model.quantization != "none" and config.performance.reference_dtype == "fp8"
        ),
        f"loss.auto_beta_limits must be [low, high] with 0 < low <= high, got {config.loss.auto_beta_limits}.": (
            not 0 < config.loss.auto_beta_limits[0] <= config.loss.auto_beta_limits[1]
        ),
    }
    for message, found in {**faults, **_rollout_faults(config), **_cache_faults(config)}.items():
        if found:
            raise ConfigError(message)


def _cache_faults(config: Config) -> dict[str, bool]:
    """Return why the reference's errors cannot be computed once and kept, and whether it is so here."""
    name, cached = config.objective_name, config.reference.cache_draws is not None
    needs, data = config.needs, config.data
    reasons = {
        f'"{name}" has no reference': "reference" not in needs,
        # What else objectives need is made of the policy's predictions, or of the data.
        f'"{name}" needs the predictions of the reference, not only its errors': not PREDICTIONS.isdisjoint(needs),
        "loss.anchor_weight needs the predictions of the reference, not only its errors": config.loss.anchor_weight > 0,
        f"with reference.update {config.reference.update} the reference moves": config.reference.update != "fixed",
        f"with denoising.noising {config.noising} the noisy latents depend on a network": config.noising in INVERSIONS,
        "with data.positive_ratio examples are drawn in no epochs": data.positive_ratio is not None,
        "with data.curriculum_stages examples are drawn in no epochs": data.curriculum_stages is not None,
        "examples must be cached: set data.cache_latents": not data.cache_latents,
    }
    return {
        f"reference.cache_draws cannot be used: {why}. Use null.": cached and holds for why, holds in reasons.items()
    }


def _rollout_faults(config: Config) -> dict[str, bool]:
    """Return what goes wrong with objectives that sample while they train, and whether it does here."""
    name, train, rollout = config.objective_name, config.train, config.rollout
    if not config.is_online:
        return {
            f'data.prompts_file is for objectives that draw the images themselves (such as spo); "{name}" learns '
            "from given ones: set data.train_data_dir or data.dataset_name.": config.data.prompts_file is not None
        }
    objective = config.entry
    kinds = {"trajectories"} if "advantages" in config.needs else {"step_pairs", "trajectory_pairs"}
    kinds = set(BACKPROPAGATIONS) if objective.layout == "reward" else kinds
    untouched = {
        "loss.anchor_weight": config.loss.anchor_weight == 0,
        "loss.sft_weight": config.loss.sft_weight == 0,
        "denoising.noising": config.denoising.noising is None,
        "denoising.snr_weighting": config.denoising.snr_weighting == "none",
        "data.scorer": config.data.scorer is None and config.data.annotations_file is None,
        "reference.cache_draws": config.reference.cache_draws is None,
    }
    useless = ", ".join(key for key, unset in untouched.items() if not unset)
    ends = [train.max_train_steps % rollout.updates, train.checkpointing_steps % rollout.updates]
    return {
        f'"{name}" draws the images itself: give it data.prompts_file (with train_data_dir and dataset_name null).': (
            config.data.prompts_file is None
        ),
        f'"{name}" needs a reward model to judge what it draws: rollout.scorer, e.g. pickscore.': (
            rollout.scorer is None
        ),
        f'rollout.collect of "{name}" must be one of {", ".join(sorted(kinds))}, got "{config.collect}".': (
            config.collect not in kinds
        ),
        f'{useless} has no effect on "{name}", which learns from transitions. Use the default.': bool(useless),
        f"train.max_train_steps and train.checkpointing_steps must be multiples of rollout.updates {rollout.updates}: "
        "a run stops and resumes where a rollout does.": any(ends),
        "denoising.timestep_low and timestep_high are for given images and whole trajectories; use 0 and null. "
        "rollout.divert_start_step and one_step_range choose steps here.": (
            config.collect not in ("trajectories", "trajectory_pairs")
            and (config.denoising.timestep_low, config.denoising.timestep_high) != (0, None)
        ),
        "rollout.likelihood: score_matching is for step_pairs without inner steps (GradSPO).": (
            rollout.likelihood == "score_matching" and (config.collect != "step_pairs" or rollout.num_inner_steps > 0)
        ),
        "rollout.winner_guidance is for step_pairs without inner steps and likelihood gaussian (TailorPO-G). Use 0.": (
            rollout.winner_guidance > 0
            and (config.collect != "step_pairs" or rollout.num_inner_steps > 0 or rollout.likelihood != "gaussian")
        ),
        "rollout.winner_guidance takes a gradient without loss scaling, which float16 would lose. Use "
        "train.mixed_precision bf16 or no.": rollout.winner_guidance > 0 and train.mixed_precision == "fp16",
        "rollout.last_step_noises is for last_steps with backprop_steps 1 (DRaFT-LV). Use 0.": (
            rollout.last_step_noises > 0 and (config.collect != "last_steps" or rollout.backprop_steps != 1)
        ),
        "rollout.ema_decay is for pairs: policy gradients and reward gradients are those of the policy that draws.": (
            rollout.ema_decay is not None and config.collect not in ("step_pairs", "trajectory_pairs")
        ),
        "rollout.eta must be above 0: a step without noise has no log-probability.": (
            rollout.eta == 0 and objective.layout == "transition"
        ),
    }
