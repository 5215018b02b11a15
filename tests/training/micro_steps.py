"""Training steps of every objective that learns from given images, on the tiny SDXL and latents in memory."""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from diffalign import config as configuration
from diffalign import objectives
from diffalign.backbones.base import Backbone
from diffalign.data.batch import PreferenceBatch
from diffalign.jobs.training import assemble, networks
from tests.e2e.pairs import noise_of

OFFLINE = [n for n in objectives.names() if objectives.objective_class(n).layout in ("pair", "single", "list")]


@dataclass
class Latents:
    """Serve examples of k images of a tiny SDXL, the same for an index every time."""

    images: int
    scored: bool = True

    def batch(self, indices, augment):
        ids, k = torch.tensor(indices), self.images
        augment(ids)
        drawn = [torch.Generator().manual_seed(index) for index in indices]

        def draw(*shape):  # rows come image by image
            rows = torch.stack([torch.randn(k, *shape, generator=generator) for generator in drawn], dim=1)
            return rows.flatten(0, 1)

        return PreferenceBatch(
            example_ids=ids,
            latent_mean=draw(4, 8, 8),
            latent_std=0.1 * torch.ones(k * len(ids), 4, 8, 8),
            text={
                "prompt_embeds": draw(1, 48)[: len(ids)].expand(-1, 77, -1).repeat(k, 1, 1),
                "pooled_prompt_embeds": draw(32)[: len(ids)].repeat(k, 1),
            },
            sizes=torch.full((k * len(ids), 6), 64),
            preference=(ids % 3 + 1) / 4,
            prompts=[str(index) for index in indices] * k,
            scores=_scores(ids, k) if self.scored else None,
            weights=1.0 + ids % 2,
            noises=[noise_of(k * index + image, "4x8x8") for image in range(k) for index in indices],
        )


def _scores(ids, k):
    """Return scores [B,k] that fall; of single images, 1 or 0."""
    return (ids[:, None] % 2 if k == 1 else torch.linspace(1, 0, k) * (1 + ids[:, None] % 2)).float()


@dataclass
class Parts:
    """Hold a tiny SDXL with LoRA that has moved away from its reference."""

    backbone: Backbone
    reference: networks.Reference

    @classmethod
    def of(cls, tiny):
        """Load a pipeline once, for the steps of all objectives."""
        config = _config(tiny, "dpo")
        backbone = assemble.load_backbone(config)
        backbone.denoiser = _unet()
        reference = networks.prepare_networks(config, backbone, Accelerator(cpu=True))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in backbone.denoiser.train().named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        return cls(backbone, reference)

    def step(self, name, **changed):
        """Return a step with an objective; `changed` are fields of the step."""
        config = _config(self.backbone.source, name)
        kind = type(config.build_objective())
        images = {"pair": 2, "list": 3, "single": 2 if kind.chosen_only else 1}[kind.layout]
        reference = self.reference if "reference" in config.build_objective().needs else None
        step = assemble.preference_step(config, self.backbone, Latents(images), reference)
        return replace(step, **changed)


def _unet():
    """Return a UNet of SDXL's kinds of blocks, two levels of one layer: what is around it is looked at."""
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=48,
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )


def _config(tiny, name):
    data = {"resolution": 64, "train_data_dir": "unused"}
    if name == "dcpo":
        data["image_caption_columns"] = ["caption_0", "caption_1"]
    if name == "pnapo":
        data["random_flip"] = False
    if name == "smpo":
        data |= {"preference_from": "scores", "annotations_file": "unused"}
    model = {"pretrained_model_name_or_path": str(tiny)}
    cheap = {"lora": {"rank": 2}, "inversion": {"num_steps": 2}}
    return configuration.check({"model": model, "objective": {"name": name}, "data": data, **cheap})
