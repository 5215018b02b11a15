"""The trainer's own sections of a configuration. Field names are those of diffusers' training scripts."""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator


class Settings(BaseModel):
    """Refuse unknown keys, and values of another type instead of converting them.

    One value where a list is wanted is a list of one, and text with commas a list of its parts.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any, info: ValidationInfo) -> Any:
        item = item_type(cls.model_fields[info.field_name].annotation)
        if item is None or value is None or isinstance(value, list | dict | bool):
            return value
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        numbers = item in (int, float)
        return [_number(part) if numbers and isinstance(part, str) else part for part in parts if part != ""]


def item_type(annotation: Any) -> Any:
    """Return the type of the items where a list is wanted; None where it is not, or text is a value of its own."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    if str in members:
        return None
    return next((get_args(member)[0] for member in members if get_origin(member) is list), None)


def _number(text: str) -> Any:
    """Return the number that a part of a list is; other text as it is, for the error."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class OptimizerSettings(Settings):
    """How the weights move."""

    name: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """adamw (fused on CUDA), adamw_8bit (needs bitsandbytes) or adafactor (fixed rate, as in Diffusion-DPO)."""
    learning_rate: float = Field(1e-5, gt=0)
    """The rate after warm-up; multiplied by the global batch size if scale_lr is set."""
    scale_lr: bool = False
    """Multiply learning_rate by global_batch_size, like --scale_lr of the official launchers (1e-8 becomes 2e-5)."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """How the rate moves. constant: no warm-up; linear and cosine: after warm-up down to 0 at max_train_steps."""
    lr_warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the mean gradient; not of adafactor."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the mean squared gradient; not of adafactor."""
    adam_weight_decay: float = Field(1e-2, ge=0)
    """Share of a weight, times the rate, that is taken off it at every step; of all three optimizers."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the mean squared gradient; not of adafactor."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Clip the global gradient norm to this."""
    use_ema: bool = False
    """Keep an exponential moving average of the trained weights and export that."""
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    """Of use_ema: how much of the average an optimizer step keeps."""


class TrainSettings(Settings):
    """How long, how many at a time, and where to."""

    output_dir: str = "runs/train"
    """Folder of the run: its configuration, metrics, checkpoints and what was trained."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of noise, timesteps, flips, caption drops, order and the adapter's start; the same seed gives the same run."""
    train_batch_size: int = Field(1, ge=1)
    """Pairs in one micro-batch on one device."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches of every device in one optimizer step."""
    global_batch_size: int | None = Field(None, ge=1)
    """Pairs in one optimizer step over all devices. If given, gradient_accumulation_steps follows from it."""
    max_train_steps: int = Field(1000, ge=1)
    """Optimizer steps of the whole run."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast for the networks; weights that train, errors and losses stay float32."""
    gradient_checkpointing: bool | Literal["auto", "selective"] = "auto"
    """Recompute activations in the backward pass instead of keeping them. auto: as little as this GPU's memory asks
    for; selective: norms, activations and casts only."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use xformers' attention in the UNet. PyTorch's own (the default) is as fast on recent GPUs."""
    allow_tf32: bool = False
    """Multiply float32 matrices in TF32 on GPUs that can: faster, with three digits less."""
    checkpointing_steps: int = Field(500, ge=1)
    """Optimizer steps between two checkpoints; there is also one after the last step."""
    checkpoints_total_limit: int | None = Field(2, ge=1)
    """Checkpoints kept, the newest; null: all."""
    resume_from_checkpoint: str | None = None
    """latest, or the folder of a checkpoint; the option --resume sets it. null: start afresh."""
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
    """Prompts, or the file that has them: one a line (.txt), or a table (.csv, .tsv, .parquet, .json, .jsonl). Other
    text is one prompt."""
    seeds: list[int] = Field([0], min_length=1)
    """Pictures of every prompt, one a seed."""
    num_inference_steps: int = Field(30, ge=1)
    """Denoising steps of a picture, with the model's own scheduler."""
    guidance_scale: float = Field(5.0, ge=0)
    """7.5 is usual for SD1.5, 5.0 for SDXL; 1 switches guidance off (of Z-Image, which counts from 0, 0 does)."""

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
    """Trackers that get the metrics beside metrics.jsonl; none, null or []: no tracker."""
    tracker_name: str = "diffalign"
    """Name of the project in the trackers."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return [] if value in (None, "none", ["none"]) else value
