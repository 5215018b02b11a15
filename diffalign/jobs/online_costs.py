"""What a method that samples while it trains costs, from its configuration alone; tests count the same in real runs."""

import math

from diffalign.config import Config
from diffalign.jobs import human_labels
from diffalign.jobs.online import latent_reward_place
from diffalign.objectives.base import BACKPROPAGATIONS


def images_with_gradient(config: Config) -> int:
    """Return how many images pass through the network with gradient for one transition or pair of them."""
    if config.collect in BACKPROPAGATIONS:
        steps = config.rollout.num_inference_steps
        through = {"one_step": 1, "last_steps": config.rollout.backprop_steps or steps}
        return through.get(config.collect, round(0.16 * steps)) * branches(config)
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
        return steps - images_with_gradient(config) // branches(config)
    if config.collect != "step_pairs":
        return steps * trajectories_per_prompt(config)
    single = rollout.divert_start_step
    within = steps - single - branch_points(config)  # steps that candidates go on alone
    later = 1 if latent_reward_place(config) else rollout.num_candidates
    return single + 1 + (branch_points(config) - 1) * later + within * rollout.num_candidates


def decoded_per_prompt(config: Config) -> int:
    """Return how many latents the rollout of a prompt sends through the VAE's decoder."""
    if config.collect in BACKPROPAGATIONS:
        return 1
    if human_labels.place_of(config):
        return 0
    if config.collect != "step_pairs":
        return trajectories_per_prompt(config)
    return 0 if latent_reward_place(config) else branch_points(config) * config.rollout.num_candidates


def examples_per_prompt(config: Config) -> int:
    """Return how many examples the rollout of a prompt gives; unclear pairs count."""
    steps, drawn = config.rollout.num_inference_steps, trajectories_per_prompt(config)
    pairs = {"step_pairs": steps - config.rollout.divert_start_step, "trajectory_pairs": steps * math.comb(drawn, 2)}
    return 1 if config.collect in BACKPROPAGATIONS else pairs.get(config.collect, steps * drawn)


def branch_points(config: Config) -> int:
    """Return at how many steps candidates branch off."""
    rollout = config.rollout
    return -(-(rollout.num_inference_steps - rollout.divert_start_step) // (rollout.num_inner_steps + 1))


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
    return (
        f"{images} images with gradient and {frozen} without per transition; {sampled} without per prompt and rollout, "
        f"{decoded_per_prompt(config)} decoded"
    )
