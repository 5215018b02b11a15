"""Network and VAE evaluations of real online runs, counted, against the theory of the papers."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffalign import config as configuration
from diffalign.backbones import loading
from diffalign.jobs.training import online_costs
from tests.e2e.test_methods import ASSETS, ROLLOUT
from tests.rollout.test_latent_reward import write_reward

PROMPTS = 1
RUNS = {
    "spo": {},
    "spo, inner steps": {"rollout": {"num_inner_steps": 1, "num_inference_steps": 5, "guidance_scale": 1.0}},
    "spo, winners moved": {"rollout": {"winner_guidance": 1.0}},
    "lpo": {"rollout": {"scorer": "lrm", "divert_start_step": 0, "timesteps_of": "current"}},
    "d3po": {},
    "d3po, best and worst": {"rollout": {"samples_per_prompt": 3, "pairs": "best_and_worst"}},
    "ddpo": {"rollout": {"samples_per_prompt": 2}},
    "ddpo, high noise": {"rollout": {"samples_per_prompt": 2}, "denoising": {"timestep_low": 500}},
    "ddpo, high noise down from pure noise": {
        "rollout": {"samples_per_prompt": 2},
        "denoising": {"timestep_low": 600},  # steps start at 999 and 749 there, else at 751
        "model": {"prediction_type": "v_prediction", "zero_terminal_snr": True},
    },
    "dpok": {"rollout": {"samples_per_prompt": 2}},
    "refl": {"rollout": {"one_step_range": [2, 2], "guidance_scale": 1.0}},
    "draft": {"rollout": {"backprop_steps": 2}},
    "draft, noised again": {"rollout": {"backprop_steps": 1, "last_step_noises": 2, "guidance_scale": 1.0}},
}


class Counter:
    """Count images through UNets that predict and latents through decoders."""

    def __init__(self, monkeypatch):
        self.with_gradient = self.without = self.decoded = 0
        predict, decode = UNet2DConditionModel.forward, AutoencoderKL.decode

        def counted_predict(unet, sample, *args, **kwargs):
            if len(unet.up_blocks):  # LPO's judge is an encoder
                kind = "with_gradient" if torch.is_grad_enabled() else "without"
                setattr(self, kind, getattr(self, kind) + len(sample))
            return predict(unet, sample, *args, **kwargs)

        def counted_decode(vae, latents, *args, **kwargs):
            self.decoded += len(latents)
            return decode(vae, latents, *args, **kwargs)

        monkeypatch.setattr(UNet2DConditionModel, "forward", counted_predict)
        monkeypatch.setattr(AutoencoderKL, "decode", counted_decode)


@pytest.fixture
def one_step(content, tiny_sdxl, tmp_path):
    """Return a function that makes the configuration of one step in which all transitions of a prompt take part."""

    def make(name, sections):
        changed = copy.deepcopy(content)
        changed["objective"] = {"name": name.partition(",")[0].replace("lpo", "spo")}
        changed["data"] = {"prompts_file": str(ASSETS / "prompts" / "tiny-train.txt"), "resolution": 64}
        changed["model"] |= sections.get("model", {})
        changed["denoising"] = sections.get("denoising", {})
        changed["rollout"] = ROLLOUT | sections.get("rollout", {})
        if changed["rollout"]["scorer"] == "lrm":
            folder = write_reward(tmp_path / "lrm", "sdxl", loading.load(tiny_sdxl).tokenizers)
            changed["rollout"]["scorer"] = f"lrm={folder}"
        return changed

    return make


@pytest.mark.parametrize("name", RUNS)
def test_a_run_costs_what_the_theory_says(name, one_step, run, monkeypatch):
    content = one_step(name, RUNS[name])
    config = configuration.check(content)
    examples = PROMPTS * online_costs.examples_per_prompt(config)
    content["train"] |= {"train_batch_size": examples, "max_train_steps": 1, "checkpointing_steps": 1}
    counter = Counter(monkeypatch)
    line = run(content)
    assert line.get("kept", 1.0) == 1.0  # unclear pairs would cost less
    images = online_costs.images_with_gradient(config)
    frozen = images if "reference" in config.build_objective().needs else 0
    sampled = online_costs.predictions_per_prompt(config) * online_costs.branches(config)
    moved = online_costs.guided_per_prompt(config) * online_costs.branches(config)
    assert counter.with_gradient == examples * images + PROMPTS * moved
    assert counter.without == examples * frozen + PROMPTS * sampled
    assert counter.decoded == PROMPTS * online_costs.decoded_per_prompt(config)


def test_the_published_recipes_cost_what_the_papers_say():
    spo = configuration.load("configs/sd15/spo.yaml")
    assert online_costs.predictions_per_prompt(spo) == 4 + 1 + 15 * 4
    assert online_costs.decoded_per_prompt(spo) == 16 * 4
    sdxl = configuration.load("configs/sdxl/spo.yaml")  # branch points 4, 8, 12, 16 of 20
    assert online_costs.branch_points(sdxl) == 4
    assert online_costs.predictions_per_prompt(sdxl) == 4 + 1 + 15 * 2
    tailorpo = configuration.load("configs/sd15/tailorpo.yaml")  # 2 candidates at every step, winners moved
    assert online_costs.predictions_per_prompt(tailorpo) == 1 + 19 * 2
    assert online_costs.guided_per_prompt(tailorpo) == 19
    assert online_costs.decoded_per_prompt(tailorpo) == 20 * (2 + 1)
    lpo = configuration.load("configs/sd15/lpo.yaml")
    assert online_costs.predictions_per_prompt(lpo) == 20
    assert online_costs.decoded_per_prompt(lpo) == 0
