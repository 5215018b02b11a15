"""From an image in any form to the pixels a scorer's network was trained on.

Scorers with the same backbone use different preprocessors, and mixing them shifts scores silently. Each has a
function here, named after the table in section 3.3 of the project's reward reference.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reward_models import pictures
from reward_models.errors import ScorerError
from reward_models.pictures import PictureError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

ImageLike = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """Hold what a network expects of its pixels; the defaults are those of every official CLIP scorer."""

    size: int = 224  # side of the square input, pixels
    mean: tuple[float, float, float] = OPENAI_MEAN  # RGB, of values in [0, 1]
    std: tuple[float, float, float] = OPENAI_STD

    def normalise(self, images: Tensor) -> Tensor:
        """Return (images - mean) / std for images [..., 3, H, W] in [0, 1]."""
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device).view(3, 1, 1)
        return (images - mean) / std

    @classmethod
    def from_clip_config(cls, config: Mapping[str, Any], *, image_size: int, source: str) -> "PixelSpec":
        """Read a Hugging Face CLIP `preprocessor_config.json`; raise ScorerError where it is not plain CLIP."""
        size, crop = config.get("size", image_size), config.get("crop_size", image_size)
        size = size.get("shortest_edge") if isinstance(size, Mapping) else size
        crop = crop.get("height") if isinstance(crop, Mapping) else crop
        found = {"size": size, "crop_size": crop, "resample": config.get("resample", 3)}
        expected = {"size": image_size, "crop_size": image_size, "resample": 3}
        wrong = [f"{key} = {found[key]} (expected {expected[key]})" for key in found if found[key] != expected[key]]
        wrong += [f"{key} = false" for key in ("do_resize", "do_center_crop", "do_normalize") if not config.get(key, 1)]
        if wrong:
            raise ScorerError(
                f"{source}: the preprocessor is not CLIP's bicubic resize and centre crop to the network's "
                f"{image_size} px: {', '.join(wrong)}. Correct preprocessor_config.json, or delete it for the defaults."
            )
        mean, std = config.get("image_mean", OPENAI_MEAN), config.get("image_std", OPENAI_STD)
        return cls(size=image_size, mean=tuple(mean), std=tuple(std))


def to_rgb(image: ImageLike) -> Image.Image:
    """Return an 8-bit RGB PIL image from a path, encoded bytes, a PIL image, an array or a tensor.

    Arrays are [H, W], [H, W, 1 | 3 | 4], tensors [1 | 3, H, W]; uint8, or floats in [0, 1], which are rounded to
    8 bits as saving a PNG would. Unlike the official scorers' `convert("RGB")`, transparency is laid on white and
    EXIF rotation is applied: people judged what a browser shows (see `pictures.to_rgb`).
    Raises ScorerError for unreadable files, other shapes and values outside the range.
    """
    if isinstance(image, Image.Image):
        return _named(image, "the image")
    if isinstance(image, np.ndarray):
        return _named(Image.fromarray(_to_uint8(image, channels_last=True)), "the array")
    if isinstance(image, Tensor):
        array = image.detach().cpu()
        array = _to_uint8((array.float() if array.is_floating_point() else array).numpy(), channels_last=False)
        return _named(Image.fromarray(array), "the tensor")
    if not isinstance(image, str | os.PathLike) and hasattr(image, "read_bytes"):  # encoded, and not in memory
        image = image.read_bytes()
    if not isinstance(image, str | os.PathLike | bytes | bytearray):
        raise ScorerError(
            f"An image cannot be a {type(image).__name__}: give a path, encoded bytes, a PIL image, "
            "a numpy array [H, W, 3] or a tensor [3, H, W]."
        )
    is_encoded = isinstance(image, bytes | bytearray)
    origin = f"the {len(image)} encoded bytes" if is_encoded else str(image)
    try:
        return pictures.decode(bytes(image) if is_encoded else pictures.read(image))
    except FileNotFoundError:
        raise ScorerError(f"There is no image file {origin}. Check the path.") from None
    except (OSError, ValueError) as error:  # PictureError is a ValueError, and so is what a NUL in a name raises
        raise ScorerError(f"Cannot read {origin} as an image ({error}). It may be truncated; write it again.") from None


def _named(image: Image.Image, origin: str) -> Image.Image:
    """Return `pictures.to_rgb` of an image in memory; name it where that fails."""
    try:
        return pictures.to_rgb(image)
    except (PictureError, OSError, SyntaxError) as error:  # a picture of Pillow may still have to be read
        raise ScorerError(f"{origin} cannot be read as RGB: {error}.") from None


def _to_uint8(array: np.ndarray, *, channels_last: bool) -> np.ndarray:
    channels, layout = ((1, 3, 4), "[H, W], [H, W, 3] or [H, W, 4]") if channels_last else ((1, 3), "[3, H, W]")
    given = f"got shape {list(array.shape)} of {array.dtype}"
    if array.ndim == 3 and not channels_last:
        array = np.moveaxis(array, 0, -1)
    is_flat = array.ndim == 2 and channels_last
    if not is_flat and (array.ndim != 3 or array.shape[-1] not in channels):
        raise ScorerError(f"An image in memory must be {layout}, {given}.")
    if np.issubdtype(array.dtype, np.floating):
        # written so that NaN fails it as well
        if not (array.size and array.min() >= 0.0 and array.max() <= 1.0):
            raise ScorerError(f"A floating-point image must hold values in [0, 1] only, {given}. Rescale or clamp it.")
        array = np.round(array * 255.0).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ScorerError(f"An image in memory must be uint8 or floating point, {given}.")
    return np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def to_tensor(image: Image.Image) -> Tensor:
    """Return the picture as float32 [3, H, W] in [0, 1]."""
    array = np.asarray(image).astype(np.float32)
    array /= 255  # in place: memory for another copy takes longer to fault in than all the arithmetic
    return torch.from_numpy(array).permute(2, 0, 1)


def clip_pil(image: Image.Image, spec: PixelSpec) -> Tensor:
    """Resize an RGB picture with PIL's bicubic filter to `size` on the short side, crop, normalise: [3, size, size].

    This is Hugging Face's CLIPImageProcessor up to transformers 4. Its crop starts at floor(excess / 2);
    torchvision's CenterCrop rounds half to even, one pixel later when the excess is 3 modulo 4.
    """
    width, height = _short_side(image.width, image.height, spec.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - spec.size) // 2, (height - spec.size) // 2
    return spec.normalise(to_tensor(resized.crop((left, top, left + spec.size, top + spec.size))))


def clip_tensor_aa(images: Tensor, spec: PixelSpec) -> Tensor:
    """Do as `clip_pil` with differentiable tensor operations: [..., 3, H, W] in [0, 1] to [..., 3, size, size].

    The antialiased bicubic filter is the same up to PIL's rounding to 8 bits: 0.004 apart on average in normalised
    units, 0.015 at most on smooth pictures and 0.5 on noise. Overshoot is not clamped.
    """
    width, height = _short_side(images.shape[-1], images.shape[-2], spec.size)
    resized = resize(images, (height, width), antialias=True)
    left, top = (width - spec.size) // 2, (height - spec.size) // 2
    return spec.normalise(resized[..., top : top + spec.size, left : left + spec.size])


def hps_letterbox(images: Tensor, spec: PixelSpec, *, antialias: bool = True) -> Tensor:
    """Fit the LONG side to `size`, add black bars, normalise: [..., 3, H, W] in [0, 1] to [..., 3, size, size].

    Source: `resize_longest_max` of tgxs002/HPSv2. `antialias=False` is its behaviour with torchvision < 0.17.
    Overshoot of the filter is kept. One deviation: the official code forgets the bars when the long side already
    has the right size and then fails on anything that is not square.
    """
    height, width = images.shape[-2:]
    scale = spec.size / max(height, width)
    if scale != 1.0:
        # Python's round, half to even, as the official code
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        images = resize(images, (height, width), antialias=antialias)
    across, down = spec.size - width, spec.size - height
    bars = (across // 2, across - across // 2, down // 2, down - down // 2)
    return spec.normalise(F.pad(images, bars))


def spm_tensor_noaa(images: Tensor, spec: PixelSpec) -> Tensor:
    """Fit the short side to `size` without antialiasing, crop, clamp, normalise: [..., 3, H, W] in [0, 1] to square.

    Source: `get_preference_score` of RockeyCoss/SPO, which does the same to images in [-1, 1]. A side is rounded
    half up, and the overshoot of the filter is clamped.
    """
    scale = spec.size / min(images.shape[-2:])
    height, width = (int(side * scale + 0.5) for side in images.shape[-2:])
    images = resize(images, (height, width), antialias=False)
    # torchvision's CenterCrop, which the official code uses, rounds half to even
    top, left = round((height - spec.size) / 2), round((width - spec.size) / 2)
    return spec.normalise(images[..., top : top + spec.size, left : left + spec.size].clamp(0, 1))


def resize(images: Tensor, size: Sequence[int], *, antialias: bool) -> Tensor:
    """Resize images [..., 3, H, W] to `size` (height, width) with the bicubic filter."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    batch = images.reshape(-1, *images.shape[-3:])
    batch = F.interpolate(batch, size=tuple(size), mode="bicubic", align_corners=False, antialias=antialias)
    return batch.reshape(*images.shape[:-3], *batch.shape[-3:])


def _short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Scale so that the shorter side is `size`; the longer one is rounded down."""
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size
