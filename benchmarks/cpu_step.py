"""One optimizer step of LoRA DPO on the embedded SDXL: diffalign against what the public scripts do.

The baseline is a straightforward reading of diffusers' SDXL DPO script: images and captions are encoded at every step,
noise comes from one global generator, the reference is the same UNet with peft's adapters disabled, and the optimizer
is the default AdamW. All sides see the same pairs, the same LoRA and the same batch, in the same process.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from peft import LoraConfig
from rich.console import Console
from torch.nn import functional

from diffalign import config as configuration
from diffalign.config import Config
from diffalign.data import PairTransform
from diffalign.jobs.training import assemble, examples
from diffalign.jobs.training.precompute import precompute
from diffalign.jobs.training.train import build_trainer, make_accelerator, train
from diffalign.training.trainer import Trainer

Step = Callable[[int], None]
CONFIG = "configs/tiny/dpo.yaml"
RANK = 8
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
PAIRS = 256  # of the embedded ones: a step does not depend on how many there are
OVERRIDES = [
    "report_to=[]",
    f"data.max_train_samples={PAIRS}",
    f"lora_target_modules=[{','.join(TARGETS)}]",
    f"rank={RANK}",
]


def settings(folder: Path, *overrides: str) -> Config:
    """Return the configuration of a measured run."""
    where = [f"data.cache_dir={folder / 'cache'}", f"output_dir={folder / 'run'}"]
    return configuration.load(CONFIG, [*OVERRIDES, *where, *overrides])


def diffalign_step(config: Config) -> Step:
    """Return a function that takes one optimizer step as `diffalign train` does."""
    trainer = _trainer(config)
    count = config.train.train_batch_size
    return lambda step: trainer._optimizer_step(step, trainer.sampler.indices(step * count, count))


def script_step(config: Config) -> Step:
    """Return a function that takes one optimizer step as the public scripts do, under autocast if the run is bf16."""
    half = config.train.mixed_precision == "bf16"
    backbone = assemble.load_backbone(config)
    source = examples.open_source(config)
    unet, count = backbone.denoiser.train(), config.train.train_batch_size
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    scheduler = DDPMScheduler.from_config(backbone.scheduler.config)
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate)
    transform = PairTransform(config.data.resolution, random_flip=False)
    beta = config.objective["beta"]

    def take(step: int) -> None:
        rows = source.rows([(step * count + i) % len(source) for i in range(count)])
        images, sizes = zip(*(transform(row.chosen.load(), row.rejected.load()) for row in rows), strict=True)
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            mean, std = backbone.encode_images(torch.stack(images, dim=1).flatten(0, 1))
            x0 = mean + std * torch.randn_like(mean)
            text = backbone.encode_prompts([row.prompt for row in rows])
            text = {name: torch.cat([column] * 2) for name, column in text.items()}
            sizes = torch.stack(sizes, dim=1).flatten(0, 1)
            cond = backbone.condition(text, sizes)
            noise = torch.randn_like(x0).chunk(2)[0].repeat(2, 1, 1, 1)
            timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (count,)).repeat(2)
            xt = scheduler.add_noise(x0, noise, timesteps)
            is_v = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x0, noise, timesteps) if is_v else noise
            pred = backbone.predict(unet, xt, timesteps, cond).float()
            policy_w, policy_l = functional.mse_loss(pred, target, reduction="none").mean((1, 2, 3)).chunk(2)
            unet.disable_adapters()
            with torch.no_grad():
                frozen = backbone.predict(unet, xt, timesteps, cond).float()
            unet.enable_adapters()
        reference_w, reference_l = functional.mse_loss(frozen, target, reduction="none").mean((1, 2, 3)).chunk(2)
        logit = -0.5 * beta * ((policy_w - policy_l) - (reference_w - reference_l))
        loss = -functional.logsigmoid(logit).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # the scripts log it at every step

    return take


def network_step(config: Config) -> Step:
    """Return a function that runs only the UNet as a step does: a pass without gradient, forward and backward."""
    trainer = _trainer(config)
    step, count = trainer.loss, config.train.train_batch_size
    posed = step.pose(step.load(trainer.sampler.indices(0, count), 0), 0)
    problem, predict = posed.problem, step.backbone.predict

    def take(_: int) -> None:
        if step.reference is not None:
            step.reference(problem.xt, problem.timesteps, posed.cond)
        predict(trainer.network, problem.xt, problem.timesteps, posed.cond).float().square().mean().backward()

    return take


def fill_caches(config: Config) -> None:
    """Do what `diffalign precompute` does."""
    _forget_precision()
    precompute(config, Console(quiet=True))


def run(config: Config) -> None:
    """Do what `diffalign train` does."""
    _forget_precision()
    train(config, Console(quiet=True), overwrite=True)


def _forget_precision() -> None:
    """Let the next run have a precision of its own: accelerate keeps one for the process, and runs share this one."""
    AcceleratorState._reset_state()


def _trainer(config: Config) -> Trainer:
    """Build what trains."""
    _forget_precision()
    trainer, _ = build_trainer(config, make_accelerator(config), Console(quiet=True))
    trainer.network.train()
    return trainer
