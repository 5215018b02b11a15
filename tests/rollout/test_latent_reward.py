"""LPO's judge of noisy latents, in the authors' folder layout, at both families' topologies."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.backbones import loading
from diffalign.denoising import DDPMPath, zero_terminal_snr
from diffalign.errors import ModelError
from diffalign.rollout import LatentReward, StepPairs, judged_levels
from tests.tiny import tiny_text_config, tiny_unet_sd15, tiny_unet_sdxl

TEXTS = ["a red circle", "a blue square on a green background", "a red circle"]
CPU = torch.device("cpu")
STAGES = {"sd15": (2, 5, 8, 11), "sdxl": (2, 5, 8)}  # of the authors, among the residuals of the encoder


def write_reward(folder, family, tokenizers, **changes):
    """Write a random reward model as the authors' `save` does; changes: heads by name, None leaves one out."""
    torch.manual_seed(3)
    unet = tiny_unet_sdxl() if family == "sdxl" else tiny_unet_sd15()
    unet.save_pretrained(folder / "unet")
    width = 16 if family == "sdxl" else 32
    CLIPTextModel(tiny_text_config(tokenizers[0], width, "quick_gelu")).save_pretrained(folder / "text_encoder")
    channels = unet.config.block_out_channels
    heads = {"visual_projection": {"weight": torch.randn(32, sum(channels) + channels[-1])}}
    if family == "sdxl":
        own = CLIPTextModelWithProjection(tiny_text_config(tokenizers[1], 32, "gelu"))
        own.save_pretrained(folder / "text_encoder_2")
    else:
        heads["text_projection"] = {"weight": torch.randn(32, 32)}
    heads |= {"logit_scale": 2.6592, **changes}
    torch.save({name: value for name, value in heads.items() if value is not None}, folder / "state_dict.pt")
    return folder


@pytest.fixture(params=["sd15", "sdxl"])
def family(request):
    return request.param


@pytest.fixture
def base(family, request):
    return loading.load(request.getfixturevalue(f"tiny_{family}"))


def encoder_features(unet, latents, timesteps, embeds, added, stages):
    """Return the pooled residuals at the authors' indices, and those of the middle block, of a whole UNet."""
    residuals, middle = [], []
    unet.conv_in.register_forward_hook(lambda _, __, output: residuals.append(output))
    for block in unet.down_blocks:
        block.register_forward_hook(lambda _, __, output: residuals.extend(output[1]))
    unet.mid_block.register_forward_hook(lambda _, __, output: middle.append(output))
    unet(latents, timesteps, encoder_hidden_states=embeds, added_cond_kwargs=added)
    return torch.cat([residuals[i].mean((2, 3)) for i in stages], 1), middle[0].mean((2, 3))


def test_the_score_is_that_of_the_authors(family, base, tmp_path):
    folder = write_reward(tmp_path, family, base.tokenizers)
    reward = LatentReward.load(folder, base, CPU, resolution=64)
    latents, timesteps = torch.randn(3, 4, 16, 16), torch.tensor([951, 501, 1])
    found = reward(latents, TEXTS, timesteps)

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    features = []
    with torch.no_grad():
        for texts in (TEXTS, [""] * 3):
            told = reward.backbone.encode_prompts(texts)
            embeds, pooled = told["prompt_embeds"], told.get("pooled_prompt_embeds")
            sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(3, 1)
            added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
            features.append(encoder_features(unet.eval(), latents, timesteps, embeds, added, STAGES[family]))
            unet = UNet2DConditionModel.from_pretrained(folder / "unet")  # without the hooks
        (levels, with_prompt), (_, without) = features
        image = torch.cat([levels, without + 7.5 * (with_prompt - without)], 1)
        image = image @ state["visual_projection"]["weight"].T
        if family == "sdxl":
            text = reward.backbone.encode_prompts(TEXTS)["pooled_prompt_embeds"]
        else:
            own = CLIPTextModel.from_pretrained(folder / "text_encoder")
            tokens = base.tokenizers[0](TEXTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
            text = own(tokens).pooler_output @ state["text_projection"]["weight"].T
    expected = torch.tensor(state["logit_scale"]).exp() * F.cosine_similarity(image, text)
    torch.testing.assert_close(found, expected[None], rtol=1e-4, atol=1e-4)
    assert found.unique().numel() == 3


def test_what_is_saved_lacks_the_decoder_and_scores_alike(family, base, tmp_path):
    reward = LatentReward.load(write_reward(tmp_path / "official", family, base.tokenizers), base, CPU, 64)
    saved = LatentReward.load(reward.save(tmp_path / "own"), base, CPU, 64)
    arguments = torch.randn(3, 4, 16, 16), TEXTS, torch.tensor([951, 501, 1])
    assert torch.equal(saved(*arguments), reward(*arguments))
    file = tmp_path / "own" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    assert set(weights) == set(reward.module.unet.state_dict())
    assert not any(name.startswith("up_blocks") for name in weights)
    name = next(iter(weights))
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(ModelError, match=name):
        LatentReward.load(tmp_path / "own", base, CPU, 64)


def test_batches_do_not_matter_and_the_timestep_does(family, base, tmp_path):
    folder = write_reward(tmp_path, family, base.tokenizers)
    latents, timesteps = torch.randn(3, 4, 16, 16), torch.full((3,), 501)
    whole, split = (LatentReward.load(folder, base, CPU, 64, batch_size=size) for size in (8, 2))
    torch.testing.assert_close(whole(latents, TEXTS, timesteps), split(latents, TEXTS, timesteps))
    assert not torch.allclose(whole(latents, TEXTS, timesteps - 200), whole(latents, TEXTS, timesteps))


def test_it_is_trained_where_sampler_steps_start_and_never_at_pure_noise(base):
    assert judged_levels(base.path).tolist() == [*range(1, 952, 50)]
    noise = DDPMPath(zero_terminal_snr(base.path.alphas_cumprod), "v_prediction")
    assert judged_levels(noise).tolist() == [0, *range(49, 950, 50)]


def test_an_encoder_that_was_not_tuned_is_the_base_s(tiny_sdxl, tmp_path):
    base = loading.load(tiny_sdxl)
    folder = write_reward(tmp_path, "sdxl", base.tokenizers)
    for file in (folder / "text_encoder").iterdir():
        file.unlink()
    (folder / "text_encoder").rmdir()
    reward = LatentReward.load(folder, base, CPU, 64)
    assert reward.backbone.text_encoders[0] is base.text_encoders[0]
    assert reward.backbone.text_encoders[1] is not base.text_encoders[1]


def test_lpo_takes_one_prediction_a_step_and_no_picture(backbone, make_sampler, prompts, tmp_path):
    reward = LatentReward.load(write_reward(tmp_path, "sdxl", backbone.tokenizers), backbone, CPU, 64)
    sampler = make_sampler(num_inference_steps=6)
    how = {"divert_start_step": 0, "threshold": 0.0, "threshold_high": 0.1, "timesteps_of": "current"}
    batch = StepPairs(sampler=sampler, scorer=reward, **how)(prompts, step=0).transitions
    assert sampler.evaluations.predicted == 6 * len(prompts)
    assert sampler.evaluations.decoded == 0
    assert len(batch) == 6 * len(prompts)


WRONG = {
    "takes 7 features": {"visual_projection": {"weight": torch.zeros(32, 7)}},
    "no text_projection, which sd15 needs": {"text_projection": None},
    "holds no heads of a latent reward model": {"logit_scale": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message, tiny_sd15, tmp_path):
    base = loading.load(tiny_sd15)
    folder = write_reward(tmp_path, "sd15", base.tokenizers, **WRONG[message])
    with pytest.raises(ModelError, match=message):
        LatentReward.load(folder, base, CPU, 64)


def test_a_folder_without_heads_says_what_is_expected(tiny_sd15, tmp_path):
    with pytest.raises(ModelError, match=r"no .*state_dict.pt.*casiatao/LRM"):
        LatentReward.load(tmp_path, loading.load(tiny_sd15), CPU, 64)
