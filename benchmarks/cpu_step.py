"""One optimizer step of LoRA DPO on the embedded SDXL: diffalign against what the public scripts do, interleaved.

The baseline is a straightforward reading of diffusers' SDXL DPO script: images and captions are encoded at every step,
noise comes from one global generator, the reference is the same UNet with peft's adapters disabled, and the optimizer
is the default AdamW. Both sides see the same pairs, the same LoRA, the same batch, in the same process.
"""

import statistics
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from rich.console import Console
from torch.nn import functional

from diffalign import config as configuration
from diffalign.data import PairSampler, PairTransform
from diffalign.jobs import assemble, examples
from diffalign.training.batching import BatchPlan
from diffalign.training.trainer import Trainer

CONFIG = "configs/tiny/dpo.yaml"
OVERRIDES = [
    "cache_dir=cache",
    "output_dir=runs/bench",
    "report_to=[]",
    "lora_target_modules=[to_k,to_q,to_v,to_out.0]",
]
ROUNDS = 12


def run() -> dict[str, object]:
    """Time both steps in turn; return medians in seconds and the median of the paired ratios."""
    config = configuration.load(CONFIG, [*OVERRIDES, "rank=8"])
    ours, baseline = diffalign_step(config), script_step(config)
    times: dict[str, list[float]] = {"diffalign": [], "script": []}
    for step in range(ROUNDS + 2):
        for name, take in (("diffalign", ours), ("script", baseline)):
            seconds = _timed(take, step)
            if step >= 2:  # warm-up
                times[name].append(seconds)
    ratios = [b / a for a, b in zip(times["diffalign"], times["script"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "what": f"LoRA r8 DPO step, {config.train.train_batch_size} pairs, 64 px, {ROUNDS} rounds interleaved",
        "diffalign_median_s": round(statistics.median(times["diffalign"]), 4),
        "script_median_s": round(statistics.median(times["script"]), 4),
        "speedup_median": round(statistics.median(ratios), 3),
        "speedup_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
    }


def diffalign_step(config: configuration.Config) -> Callable[[int], None]:
    """Return a function that takes one optimizer step as `diffalign train` does."""
    accelerator = Accelerator()
    backbone = assemble.load_backbone(config, "no")
    source = examples.open_source(config)
    pairs = examples.open_encoded(config, backbone, source, accelerator)
    reference = assemble.prepare_networks(config, backbone, accelerator)
    trainer = Trainer(
        accelerator=accelerator,
        policy=backbone.denoiser,
        loss=assemble.preference_step(config, backbone, pairs, reference),
        sampler=PairSampler(len(pairs), 0),
        plan=BatchPlan.of(config.train, 1),
        train=config.train,
        optimizer=config.optimizer,
        logging=config.logging,
        console=Console(quiet=True),
    )
    trainer.network.train()
    count = config.train.train_batch_size
    return lambda step: trainer._optimizer_step(step, trainer.sampler.indices(step * count, count))


def script_step(config: configuration.Config) -> Callable[[int], None]:
    """Return a function that takes one optimizer step as the public scripts do."""
    backbone = assemble.load_backbone(config, "no")
    source = examples.open_source(config)
    assemble.prepare_networks(config, backbone, Accelerator())
    unet, count = backbone.denoiser.train(), config.train.train_batch_size
    scheduler = DDPMScheduler.from_config(backbone.scheduler.config)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate)
    transform = PairTransform(config.data.resolution, random_flip=False)
    beta = config.objective["beta"]

    def take(step: int) -> None:
        rows = source.rows([(step * count + i) % len(source) for i in range(count)])
        images, sizes = zip(*(transform(row.chosen.load(), row.rejected.load()) for row in rows), strict=True)
        pixels = torch.stack(images, dim=1).flatten(0, 1)
        mean, std = backbone.encode_images(pixels)
        x0 = mean + std * torch.randn_like(mean)
        embeds, pooled = backbone.encode_prompts([row.prompt for row in rows])
        sizes = torch.stack(sizes, dim=1).flatten(0, 1)
        cond = backbone.condition(embeds.repeat(2, 1, 1), pooled.repeat(2, 1), sizes)
        noise = torch.randn_like(x0).chunk(2)[0].repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (count,)).repeat(2)
        xt = scheduler.add_noise(x0, noise, timesteps)
        pred = backbone.predict(unet, xt, timesteps, cond)
        policy_w, policy_l = functional.mse_loss(pred, noise, reduction="none").mean((1, 2, 3)).chunk(2)
        unet.disable_adapters()
        with torch.no_grad():
            frozen = backbone.predict(unet, xt, timesteps, cond)
        reference_w, reference_l = functional.mse_loss(frozen, noise, reduction="none").mean((1, 2, 3)).chunk(2)
        unet.enable_adapters()
        logit = -0.5 * beta * ((policy_w - policy_l) - (reference_w - reference_l))
        loss = -functional.logsigmoid(logit).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # the scripts log it at every step

    return take


def _timed(take: Callable[[int], None], step: int) -> float:
    start = time.perf_counter()
    take(step)
    return time.perf_counter() - start
