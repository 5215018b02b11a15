"""What the published scorer packages do for every image: the loops that `diffalign score` is measured against.

PickScore's README opens the file, calls the processor on the image and on the prompt, both towers and `.item()`;
`hpsv2.score` opens the file again, transforms, tokenizes, runs the whole model and reads one number. Weights are loaded
once, though hpsv2 1.2 loads them at every call. Everything is float32, as both are on a CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, ToTensor
from torchvision.transforms import functional as transforms

from reward_models.preprocess import PixelSpec

Step = Callable[[Path, str], float]


@torch.no_grad()
def loop(files: Sequence[Path], prompts: Sequence[str], steps: Mapping[str, Step]) -> dict[str, np.ndarray]:
    """Return the scores [N] by scorer, one image at a time."""
    found = {name: [step(f, p) for f, p in zip(files, prompts, strict=True)] for name, step in steps.items()}
    return {name: np.array(values) for name, values in found.items()}


def pickscore_step(processor: Any, model: Any) -> Step:
    """Return PickScore's `calc_probs` for one image (yuvalkirstain/PickScore, README)."""
    length = model.config.text_config.max_position_embeddings
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}

    def step(file: Path, prompt: str) -> float:
        image = processor(images=[Image.open(file)], return_tensors="pt").to(model.device)
        text = processor(text=prompt, **options).to(model.device)
        image_embs = model.get_image_features(**image).pooler_output
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**text).pooler_output
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T)[0]).item()

    return step


def hpsv2_step(model: Any, tokenizer: Any, spec: PixelSpec) -> Step:
    """Return the body of the loop of `hpsv2.score` (tgxs002/HPSv2, img_score.py)."""
    transform, device = hpsv2_transform(spec), model.logit_scale.device

    def step(file: Path, prompt: str) -> float:
        image = transform(Image.open(file).convert("RGB")).unsqueeze(0).to(device)
        text = tokenizer([prompt]).to(device)
        image_embs, text_embs, _ = model(image, text)
        return torch.diagonal(image_embs @ text_embs.T).cpu().numpy()[0].item()

    return step


def hpsv2_transform(spec: PixelSpec) -> Compose:
    """Return hpsv2's transform on torchvision: the long side to `size` (transform.py, resize_longest_max)."""

    def fit(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        scale = spec.size / max(height, width)
        if scale == 1:
            return image
        sides = [round(height * scale), round(width * scale)]
        image = transforms.resize(image, sides, InterpolationMode.BICUBIC)
        down, across = (spec.size - side for side in sides)
        return transforms.pad(image, [across // 2, down // 2, across - across // 2, down - down // 2])

    return Compose([ToTensor(), fit, Normalize(spec.mean, spec.std)])
