"""What the public scripts do on a GPU, with random weights: the baseline of `python -m benchmarks gpu`."""

import copy
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from peft import LoraConfig
from torch.nn import functional as F

from benchmarks.gpu_steps import pooled_width, random_backbone
from diffalign.backbones.adapters import ATTENTION
from diffalign.backbones.published import COMPONENTS

BETA, RANK = 5000.0, 64


def script_step(family: str, tune: str, side: int, pairs: int, device: torch.device, tiny: bool) -> Callable[[], None]:
    """Return an optimizer step of accumulated single pairs: VAE in float32, autocast, checkpointing.

    The text encoders are left out (0.2 % of the work), and so is reading and decoding pictures.
    """
    full = tune == "full"
    unet = random_backbone(family, torch.float32 if full else torch.bfloat16, device, tiny).denoiser.train()
    frozen = copy.deepcopy(unet).to(torch.bfloat16).requires_grad_(False) if full else unet
    if not full:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION)))
        for parameter in unet.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    unet.enable_gradient_checkpointing()
    vae = AutoencoderKL(**_vae(tiny) | {"latent_channels": unet.config.in_channels}).to(device).requires_grad_(False)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    trained = [p for p in unet.parameters() if p.requires_grad]
    moves = torch.optim.AdamW(trained, lr=1e-5)
    pixels = torch.rand(2, 3, side, side, device=device) * 2 - 1
    text, added = _conditioning(unet, side, device)

    def backward() -> None:
        x0 = torch.cat([vae.encode(image).latent_dist.sample() for image in pixels.split(1)]) * 0.13
        noise = torch.randn_like(x0[:1]).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, 1000, (1,), device=device).repeat(2)
        inputs = (scheduler.add_noise(x0, noise, timesteps), timesteps, text)
        with torch.autocast(device.type, torch.bfloat16):
            pred = unet(*inputs, added_cond_kwargs=added, return_dict=False)[0]
            with torch.no_grad():
                if not full:
                    unet.disable_adapters()
                anchor = frozen(*inputs, added_cond_kwargs=added, return_dict=False)[0]
                if not full:
                    unet.enable_adapters()
        policy, reference = (F.mse_loss(p.float(), noise, reduction="none").mean((1, 2, 3)) for p in (pred, anchor))
        logit = -0.5 * BETA * ((policy[0] - policy[1]) - (reference[0] - reference[1]))
        loss = -F.logsigmoid(logit) / pairs
        loss.backward()
        loss.item()  # the scripts log it

    def take() -> None:
        for _ in range(pairs):
            backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        moves.step()
        moves.zero_grad()

    return take


def _vae(tiny: bool) -> dict:
    config = {key: value for key, value in COMPONENTS["sdxl"]["vae"][2].items() if not key.startswith("_")}
    config["norm_num_groups"] = 8 if tiny else 32
    return config | {"block_out_channels": [8, 8, 8, 8]} if tiny else config


def _conditioning(unet: torch.nn.Module, side: int, device: torch.device) -> tuple[torch.Tensor, dict | None]:
    config = unet.config
    text = torch.randn(2, 77, config.cross_attention_dim, device=device)
    if config.addition_embed_type != "text_time":
        return text, None
    width = pooled_width(unet)
    return text, {
        "text_embeds": torch.randn(2, width, device=device),
        "time_ids": torch.full((2, 6), float(side), device=device),
    }
