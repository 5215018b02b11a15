"""What the weights of a run depend on: a resumed run must agree with its checkpoint on all of it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from diffalign.backbones.base import Backbone
from diffalign.config import Config, portable
from diffalign.data.fingerprints import digest_files
from diffalign.jobs.training import assemble, networks, own_code
from diffalign.training.batching import BatchPlan

# Keys that may change on resume: where things are, what is written down, how many are done at a time. Those of
# `performance`, `validation` and `logging` are free as well. What is new and not named here may not change.
FREE = {
    "lora": {"export_kohya"},
    "data": {
        *("cache_dir", "train_data_dir", "dataset_name", "prompts_file", "annotations_file"),  # the content decides
        "vae_encode_batch_size",
    },
    # How timesteps are drawn: what comes of it for the model decides.
    "denoising": {
        *("timestep_density", "logit_mean", "logit_std", "mode_scale", "timesteps", "timestep_shift"),
    },
    "inversion": {"batch_size"},
    "rollout": {"sample_batch_size", "decode_batch_size"},
    "train": {
        *("output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("push_to_hub", "hub_model_id", "hub_private"),
        *("train_batch_size", "gradient_accumulation_steps", "global_batch_size"),  # their product decides
        *("gradient_checkpointing", "enable_xformers_memory_efficient_attention", "allow_tf32"),
        "max_train_steps",  # unless the learning rate or the objective depends on it
    },
}


class Source(Protocol):
    """Say what a run learns from."""

    name: str

    def identify(self, cache: Path) -> Any:
        """Return what the content is; `cache` keeps hashes that are expensive."""


def run_identity(config: Config, plan: BatchPlan, backbone: Backbone, source: Source) -> dict[str, Any]:
    """Return everything the weights of a run depend on."""
    known = settings_identity(config, plan)
    data = dict(known["data"])
    if config.data.annotations_file:
        data["annotations"] = digest_files([Path(config.data.annotations_file)], None)[0]
    content = source.identify(Path(config.data.cache_dir) / "content_hashes.sqlite")
    data["content"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    lora = {"lora": known["lora"] | _targets(config, backbone)} if "lora" in known else {}
    fingerprints = {"denoiser": backbone.denoiser_fingerprint(), "encoders": backbone.fingerprint()}
    denoising = known["denoising"] | assemble.sampling_identity(config, backbone)
    return {**known, **lora, "denoising": denoising, "model": known["model"] | fingerprints, "data": data}


def _targets(config: Config, backbone: Backbone) -> dict[str, list[str]]:
    return {"lora_target_modules": config.lora.lora_target_modules or list(backbone.lora_targets)}


def settings_identity(config: Config, plan: BatchPlan) -> dict[str, Any]:
    """Return what of it can be told without the model and the data."""
    wanted = ["objective", "denoising", "inversion", "reference", "loss", "optimizer", "train", "data"]
    wanted += ["lora"] if config.model.tune == "lora" else []
    wanted += ["rollout"] if config.is_online else []
    sections = {
        name: {key: value for key, value in keys.items() if key not in FREE.get(name, ())}
        for name, keys in portable(config).model_dump(mode="json").items()
        if name in wanted
    }
    if config.data.long_prompts == "truncate":  # as before there was the key
        del sections["data"]["long_prompts"]
    performance, train = config.performance, sections["train"]
    train["global_batch_size"] = plan.global_batch_size
    train["precision"] = [config.pure_bf16, performance.reference_dtype, performance.sampling_dtype]
    if config.optimizer.lr_scheduler in ("linear", "cosine") or "progress" in config.needs:
        train["max_train_steps"] = config.train.max_train_steps
    if "lora" in sections and config.lora.lora_target_modules is None:  # the family decides
        del sections["lora"]["lora_target_modules"]
    schedule = {"zero_terminal_snr": True} if config.model.zero_terminal_snr else {}  # no tensor shows it
    model = {"tune": config.model.tune, **networks.base_identity(config), **schedule}
    return {**sections, "model": model, **own_code.sources(config)}
