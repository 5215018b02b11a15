"""Training steps of the published UNets with random weights: milliseconds a pair, TFLOP/s, memory, option by option.

Latents and embeddings are random and live on the device, so a step is what it is with a warm cache.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import AutoencoderKL, EulerDiscreteScheduler

from diffalign import config as configuration
from diffalign.backbones import loading, published
from diffalign.backbones.base import Backbone, move
from diffalign.backbones.sd15 import SD15
from diffalign.backbones.sdxl import SDXL
from diffalign.config import Config
from diffalign.data.batch import Augment, PreferenceBatch
from diffalign.jobs.training import assemble, networks, static
from diffalign.training import optimizer
from diffalign.training.static_step import Recorder, StaticStep

# TFLOP of one pair, 2 x MAC, counted on meta tensors (docs/performance.md).
FLOPS = {"sdxl": {"lora": 43.42, "full": 54.77}, "sd15": {"lora": 5.26, "full": 6.55}}
REFERENCE_FREE = {"sdxl": {"lora": 29.90, "full": 41.25}, "sd15": {"lora": 3.66, "full": 4.94}}
SIDES = {"sdxl": 1024, "sd15": 512}
FAST = ["mixed_precision=bf16", "compile=regional", "gradient_checkpointing=false"]
# Each option switched off in turn, then more of everything.
OPTIONS: dict[str, list[str]] = {
    "all": [],
    "eager": ["compile=none"],
    "contiguous": ["channels_last=false"],
    "autocast": ["pure_bf16=false"],
    "peft's LoRA": ["fused_lora=false"],
    "text not shared": ["share_text=false"],
    "activations not fused": ["fused_activations=false"],
    "torch kernels": ["kernels=torch"],
    "attention probed": ["attention=auto"],
    "checkpointed": ["gradient_checkpointing=true"],
    "selectively checkpointed": ["gradient_checkpointing=selective"],
    "LoRA in mid and up blocks": ["lora.blocks=[mid,up]"],
    "compiled as a whole": ["compile=full"],
    "CUDA graphs": ["compile=full", "cuda_graphs=passes"],
    "CUDA graph of the step": ["cuda_graphs=step"],
    "CUDA graph of the step, compiled as a whole": ["compile=full", "cuda_graphs=step"],
    "fp8 reference": ["reference_dtype=fp8"],
    "no reference (MaPO)": ["objective.name=mapo"],
}


@dataclass
class RandomPairs:
    """Serve random pairs of a model's true shape from the device's memory: the numbers do not matter."""

    backbone: Backbone
    side: int  # pixels

    def batch(self, indices: list[int], augment: Augment) -> PreferenceBatch:
        """Return B pairs."""
        denoiser, rows = self.backbone.denoiser, 2 * len(indices)
        device, config = next(denoiser.parameters()).device, denoiser.config
        mean = torch.randn(rows, config.in_channels, self.side // 8, self.side // 8, device=device)
        text = {"prompt_embeds": torch.randn(len(indices), 77, config.cross_attention_dim, device=device)}
        if config.addition_embed_type == "text_time":
            text["pooled_prompt_embeds"] = torch.randn(len(indices), pooled_width(denoiser), device=device)
        return PreferenceBatch(
            example_ids=torch.tensor(indices).to(device, non_blocking=True),
            latent_mean=mean,
            latent_std=0.1 * torch.ones_like(mean),
            text={name: torch.cat([column] * 2) for name, column in text.items()},
            sizes=torch.full((rows, 6), self.side, device=device),
            preference=None,
            prompts=[""] * rows,
        )


def pooled_width(unet: torch.nn.Module) -> int:
    """Return the width of SDXL's pooled text: what its embedding takes besides six encoded sizes."""
    return unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim


def settings(family: str, tune: str, pairs: int, overrides: list[str]) -> Config:
    """Return the configuration of a measured step."""
    file = f"configs/{family}/dpo.yaml"
    model = ["lora.rank=64", "learning_rate=1e-5", f"model.tune={tune}", "optimizer.name=adamw"]
    size = [f"train_batch_size={pairs}", f"global_batch_size={pairs}", "report_to=[]"]
    return configuration.load(file, [*model, *size, *FAST, *overrides])


def our_step(config: Config, family: str, device: torch.device, tiny: bool) -> Callable[[], None]:
    """Return a function that takes one optimizer step: draws, noising, reference, policy, backward, AdamW."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    accelerator = Accelerator(mixed_precision="no" if config.pure_bf16 else config.train.mixed_precision)
    full = config.model.tune == "full"
    backbone = random_backbone(family, torch.float32 if full else torch.bfloat16, device, tiny)
    kind = config.train.gradient_checkpointing
    reference = networks.prepare_networks(
        config, backbone, accelerator, "full" if kind is True else "selective" if kind == "selective" else "none"
    )
    pairs = RandomPairs(backbone, 64 if tiny else SIDES[family])
    step = assemble.preference_step(config, backbone, pairs, reference)
    trained = [p for p in backbone.denoiser.parameters() if p.requires_grad]
    network, moves = accelerator.prepare(backbone.denoiser.train(), optimizer.build(trained, config.optimizer))
    indices = list(range(config.train.train_batch_size))
    replayed = None
    if config.performance.cuda_graphs == "step":  # a CPU keeps the function: what is around a graph runs there, too
        replayed = StaticStep(step.prepare, step.evaluate, accelerator.backward, static.recorder() or Recorder())

    def take() -> None:
        if replayed is not None:
            replayed(network, indices, 0)
        else:
            loss, _ = step(network, indices, 0)
            accelerator.backward(loss.mean())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        moves.step()
        moves.zero_grad(set_to_none=replayed is None)

    return take


def random_backbone(family: str, dtype: torch.dtype, device: torch.device, tiny: bool) -> Backbone:
    """Return the published UNet with random weights, or the embedded one if `tiny`; its encoders are not used."""
    small = loading.load("assets/tiny-sdxl", torch_dtype=torch.float32)
    if tiny:
        move(small.denoiser, device, dtype)
        return small
    encoders = 2 if family == "sdxl" else 1
    return (SDXL if family == "sdxl" else SD15)(
        denoiser=published.random_unet(family, dtype, device),
        vae=AutoencoderKL(),  # of 4 channels, as theirs
        tokenizers=small.tokenizers[:encoders],
        text_encoders=small.text_encoders[:encoders],
        scheduler=EulerDiscreteScheduler.from_config(published.COMPONENTS[family]["scheduler"][2]),
        source=f"random {family}",
    )


def measure(take: Callable[[], None], device: torch.device, rounds: int = 5, warm_up: int = 2) -> dict[str, float]:
    """Return the median milliseconds of a call and the peak of memory in GiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(rounds + warm_up):
        start = time.perf_counter()
        take()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warm_up:
            times.append(1000 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"ms": round(statistics.median(times), 2), "fastest_ms": round(min(times), 2), "peak_gib": round(peak, 2)}


def release() -> None:
    """Give memory back before the next measurement."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
