"""The trainer's own sections of a configuration. Field names are those of diffusers' training scripts."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Refuse unknown keys, and values of another type instead of converting them."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class OptimizerSettings(Settings):
    """How the weights move."""

    name: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw (fused on CUDA), adamw_8bit (needs bitsandbytes) or adafactor (fixed rate, as in Diffusion-DPO)."""
    learning_rate: float = Field(1e-5, gt=0)
    """The rate after warm-up; multiplied by the global batch size if scale_lr is set."""
    scale_lr: bool = False
    """Multiply learning_rate by global_batch_size, like --scale_lr of the official launchers (1e-8 becomes 2e-5)."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    lr_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip the global gradient norm to this."""
    use_ema: bool = False
    """Keep an exponential moving average of the trained weights and export that."""
    ema_decay: float = Field(0.9999, gt=0, lt=1)


class TrainSettings(Settings):
    """How long, how many at a time, and where to."""

    output_dir: str = "runs/train"
    seed: int = Field(0, ge=0, lt=2**32)
    train_batch_size: int = Field(1, ge=1)
    """Pairs in one micro-batch on one device."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    global_batch_size: int | None = Field(None, ge=1)
    """Pairs in one optimizer step over all devices. If given, gradient_accumulation_steps follows from it."""
    max_train_steps: int = Field(1000, ge=1)
    """Optimizer steps."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast for the networks; weights that train, errors and losses stay float32."""
    gradient_checkpointing: bool | Literal["auto", "selective"] = "auto"
    """Recompute activations in the backward pass instead of keeping them. auto: as little as this GPU's memory asks
    for; selective: norms, activations and casts only."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use xformers' attention in the UNet. PyTorch's own (the default) is as fast on recent GPUs."""
    allow_tf32: bool = False
    checkpointing_steps: int = Field(500, ge=1)
    checkpoints_total_limit: int | None = Field(2, ge=1)
    resume_from_checkpoint: str | None = None
    """"latest", or the folder of a checkpoint."""
    push_to_hub: bool = False
    """Upload the result (model card, LoRA or UNet, validation pictures) to the Hugging Face hub when it is done. Who
    you are says `hf auth login` or HF_TOKEN; a token never goes into a configuration."""
    hub_model_id: str | None = None
    """Where to, such as me/sdxl-dpo; null: the name of output_dir, under the name that is logged in."""
    hub_private: bool = False
    """Make the repository private, if it does not exist yet."""

    @model_validator(mode="after")
    def _one_way_to_accumulate(self) -> "TrainSettings":
        if self.global_batch_size is not None and "gradient_accumulation_steps" in self.model_fields_set:
            raise ValueError(
                "Give train.global_batch_size or train.gradient_accumulation_steps, not both: one gives the other "
                "(train.global_batch_size: null switches it off)"
            )
        return self


class ValidationSettings(Settings):
    """Pictures drawn while training."""

    validation_steps: int | None = Field(None, ge=1)
    """Draw a base-against-aligned grid every so many steps; null for never."""
    validation_prompts: list[str] | str | None = None
    """Prompts, or a text file with one a line."""
    seeds: list[int] = Field([0], min_length=1)
    num_inference_steps: int = Field(30, ge=1)
    guidance_scale: float = Field(5.0, ge=0)

    @model_validator(mode="after")
    def _something_to_draw(self) -> "ValidationSettings":
        if self.validation_steps is not None and not self.validation_prompts:
            raise ValueError(
                "validation.validation_steps needs validation.validation_prompts: a list of prompts, or a text file"
            )
        return self


class LoggingSettings(Settings):
    """What is written down."""

    logging_steps: int = Field(10, ge=1)
    """Metrics are averaged over so many steps and written to metrics.jsonl and the trackers."""
    report_to: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"])
    tracker_name: str = "diffalign"
