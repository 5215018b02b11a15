"""What the weights of a run depend on: a resumed run must agree with its checkpoint on all of it."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from diffalign.backbones.base import Backbone
from diffalign.config import Config, portable
from diffalign.data.fingerprints import digest_files
from diffalign.jobs.training import assemble, own_code
from diffalign.training.batching import BatchPlan

# Of the section data: where things are, which says nothing about what they are, and what content is hashed instead.
WHERE = ("cache_dir", "train_data_dir", "dataset_name", "prompts_file", "vae_encode_batch_size", "annotations_file")
# Of the section denoising: how timesteps are drawn, of which the weights depend on what comes of it for the model.
SAMPLING = {"timestep_density", "logit_mean", "logit_std", "mode_scale", "timesteps", "timestep_shift"}


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
    sections = portable(config).model_dump(mode="json")
    train = {key: sections["train"][key] for key in ("seed", "mixed_precision")}
    train["global_batch_size"] = plan.global_batch_size
    train["precision"] = [config.pure_bf16, config.performance.reference_dtype, config.performance.sampling_dtype]
    if config.optimizer.lr_scheduler in ("linear", "cosine"):
        train["max_train_steps"] = config.train.max_train_steps
    data = {key: value for key, value in sections["data"].items() if key not in WHERE}
    adapter = {"lora": sections["lora"]} if config.model.tune == "lora" else {}
    if config.lora.lora_target_modules is None:  # the family decides
        del sections["lora"]["lora_target_modules"]
    asked = ["objective", "denoising", "inversion", "reference", "loss", "optimizer"]
    if config.is_online:
        asked.append("rollout")
        sections["rollout"] = {key: value for key, value in sections["rollout"].items() if "batch_size" not in key}
    sections = {name: sections[name] for name in asked}
    sections["denoising"] = {key: value for key, value in sections["denoising"].items() if key not in SAMPLING}
    sections = {**sections, **adapter, "train": train, "model": {"tune": config.model.tune}, "data": data}
    return sections | own_code.sources(config)
