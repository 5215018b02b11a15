"""What a method that samples while it trains costs, from its configuration alone; tests count the same in real runs."""

import json
import math

from diffalign.config import Config
from diffalign.denoising import STABLE_DIFFUSION, DDPMPath, ladder
from diffalign.jobs.training import human_labels
from diffalign.jobs.training.online_judges import latent_reward_place
from diffalign.places import local
from diffalign.vocabulary import BACKPROPAGATIONS


def images_with_gradient(config: Config) -> int:
    """Return how many images pass through the network with gradient for one transition or pair of them."""
    if config.collect in BACKPROPAGATIONS:
        return (_steps_with_gradient(config) + config.rollout.last_step_noises) * branches(config)
    shared = config.collect == "trajectories" or (config.collect == "step_pairs" and not config.rollout.num_inner_steps)
    return (1 if shared else 2) * branches(config)


def predictions_per_prompt(config: Config) -> int:
    """Return how many guided predictions the rollout of a prompt takes.

    SPO: those before the first candidates, one where they branch off, then those of all candidates, which the sampler
    goes on from. A judge of noisy latents needs no prediction of a candidate, so each branch point takes one (LPO).
    """
    rollout = config.rollout
    steps = rollout.num_inference_steps
    if config.collect == "one_step":
        return round(sum(rollout.one_step_range or (0, steps - 1)) / 2)  # before the step that is judged, on average
    if config.collect in BACKPROPAGATIONS:
        return steps - _steps_with_gradient(config)
    if config.collect != "step_pairs":
        return steps * trajectories_per_prompt(config)
    single = rollout.divert_start_step
    within = steps - single - branch_points(config)  # steps that candidates go on alone
    later = 1 if latent_reward_place(config) else rollout.num_candidates
    return single + 1 + (branch_points(config) - 1) * later + within * rollout.num_candidates


def guided_per_prompt(config: Config) -> int:
    """Return how many guided predictions of a prompt's rollout have a gradient in the latent: those of its winners.

    TailorPO-G takes it before anything is learnt. Finished pictures need no prediction.
    """
    return branch_points(config) - 1 if _moves_winners(config) else 0


def decoded_per_prompt(config: Config) -> int:
    """Return how many latents the rollout of a prompt sends through the VAE's decoder, winners that move once more."""
    if config.collect in BACKPROPAGATIONS:
        return 1 + config.rollout.last_step_noises
    if human_labels.place_of(config):
        return 0
    if config.collect != "step_pairs":
        return trajectories_per_prompt(config)
    judged = 0 if latent_reward_place(config) else config.rollout.num_candidates
    return branch_points(config) * (judged + _moves_winners(config))


def examples_per_prompt(config: Config) -> int:
    """Return how many examples the rollout of a prompt gives; unclear pairs count."""
    drawn = trajectories_per_prompt(config)
    if config.collect == "step_pairs":
        return config.rollout.num_inference_steps - config.rollout.divert_start_step
    if config.collect in BACKPROPAGATIONS:
        return 1
    if config.collect == "trajectory_pairs":
        drawn = math.comb(drawn, 2) if config.rollout.pairs == "all" else 1
    return _learnt_steps(config) * drawn


def branch_points(config: Config) -> int:
    """Return at how many steps candidates branch off."""
    rollout = config.rollout
    return -(-(rollout.num_inference_steps - rollout.divert_start_step) // (rollout.num_inner_steps + 1))


def _learnt_steps(config: Config) -> int:
    """Return how many steps of a trajectory start where denoising.timestep_low and timestep_high allow it."""
    path = DDPMPath.from_config(STABLE_DIFFUSION | {"rescale_betas_zero_snr": _ends_in_noise(config)})
    levels = ladder(path, config.rollout.num_inference_steps).timesteps
    high = config.denoising.timestep_high or int(levels.max()) + 1
    return int(((levels >= config.denoising.timestep_low) & (levels < high)).sum())


def _ends_in_noise(config: Config) -> bool:
    """Tell whether the model's schedule ends in pure noise, as far as this machine knows: its steps then lie higher."""
    file = local(config.model.pretrained_model_name_or_path) / "scheduler" / "scheduler_config.json"
    try:
        said = json.loads(file.read_text(encoding="utf8")).get("rescale_betas_zero_snr")
    except (OSError, ValueError):
        said = False  # not here; what is damaged is refused where it is loaded
    return bool(said or config.model.zero_terminal_snr)


def _steps_with_gradient(config: Config) -> int:
    """Return how many steps of a drawn image have a gradient: AlignProp's are about 16 % of all."""
    steps = config.rollout.num_inference_steps
    through = {"one_step": 1, "last_steps": config.rollout.backprop_steps or steps}
    return through.get(config.collect, round(0.16 * steps))


def _moves_winners(config: Config) -> bool:
    return config.collect == "step_pairs" and config.rollout.winner_guidance > 0


def trajectories_per_prompt(config: Config) -> int:
    """Return how many trajectories are drawn of a prompt, where whole ones are."""
    return config.rollout.samples_per_prompt or (2 if config.collect == "trajectory_pairs" else 1)


def branches(config: Config) -> int:
    """Return how many images a guided prediction passes through the network."""
    return 1 if config.rollout.guidance_scale == 1.0 else 2


def passes(config: Config) -> str:
    """Word how many images pass through the network for one transition, the cost of a method."""
    images, sampled = images_with_gradient(config), predictions_per_prompt(config) * branches(config)
    if config.collect in BACKPROPAGATIONS:
        return f"about {images} images with gradient and {sampled} without per drawn image"
    frozen = images if "reference" in config.build_objective().needs else 0
    moved = guided_per_prompt(config) * branches(config)
    return (
        f"{images} images with gradient and {frozen} without per transition; {sampled} without "
        f"{f'and {moved} with a gradient in the latent ' if moved else ''}per prompt and rollout, "
        f"{decoded_per_prompt(config)} decoded"
    )
