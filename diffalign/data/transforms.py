"""From decoded images to what the VAE sees: resize, crop and flip, with SDXL's size conditioning."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import DataError

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class View:
    """Hold one image as it was cut, unflipped; its mirror image is `pixels.flip(-1)`."""

    pixels: Tensor  # uint8 [3,H,W]
    sizes: tuple[int, ...]  # original_h, original_w, crop_top, crop_left, target_h, target_w
    flipped_sizes: tuple[int, ...]  # the same of the mirror image


@dataclass(frozen=True)
class PairTransform:
    """Cut all images of an example in the same way: short side to `resolution`, square crop, joint mirroring.

    As torchvision's Resize and CenterCrop on Pillow images do it, bit for bit. Deviation from the authors' script,
    which mirrors winner and loser independently: here a pair is mirrored as a whole, as in diffusers' scripts, so
    that the two images differ only in what people judged.

    Args:
        resolution: side of the square in pixels, a multiple of 8.
        center_crop: cut the centre; False cuts where `crop` says, which needs OnlinePairs.
        random_flip: allow mirroring; a LatentCache then holds both variants.
        interpolation: "bilinear" (all published recipes), "bicubic" or "lanczos".
        sizes: what SDXL is told: "original" (each image's own size and crop, as SDXL was trained) or "resolution"
            (always resolution and no crop, as in the authors' DPO script).
    """

    resolution: int
    center_crop: bool = True
    random_flip: bool = True
    interpolation: str = "bilinear"
    sizes: str = "original"

    def __post_init__(self):
        if self.resolution < 8 or self.resolution % 8:
            raise DataError(f"resolution must be a positive multiple of 8, got {self.resolution}.")
        if self.interpolation not in FILTERS:
            raise DataError(f'interpolation must be one of {", ".join(FILTERS)}, got "{self.interpolation}".')
        if self.sizes not in ("original", "resolution"):
            raise DataError(f'sizes must be "original" or "resolution", got "{self.sizes}".')

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything the result depends on."""
        return asdict(self)

    def view(self, image: Image.Image, crop: tuple[float, float] = (0.5, 0.5)) -> View:
        """Resize and crop one RGB image; `crop` are two numbers in [0, 1) that place a random crop, top then left."""
        width, height = image.size
        side, short = self.resolution, min(width, height)
        new_w, new_h = int(side * width / short), int(side * height / short)
        if (new_w, new_h) != (width, height):
            image = image.resize((new_w, new_h), FILTERS[self.interpolation])
        top, left = self._corner(new_h - side, crop[0]), self._corner(new_w - side, crop[1])
        if (new_w, new_h) != (side, side):
            image = image.crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
        if self.sizes == "resolution":
            return View(pixels, (side, side, 0, 0, side, side), (side, side, 0, 0, side, side))
        # To cut and mirror is to mirror and cut at the mirrored place: the latter is what diffusers records.
        sizes = (height, width, top, left, side, side)
        return View(pixels, sizes, (height, width, top, new_w - side - left, side, side))

    def _corner(self, slack: int, draw: float) -> int:
        return round(slack / 2.0) if self.center_crop else min(int(draw * (slack + 1)), slack)

    def __call__(
        self, *images: Image.Image, flip: bool = False, crop: tuple[float, float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return images [k,3,H,W] in [0,1] and sizes [k,6] of the k images of an example, in their order.

        Args:
            images: RGB images.
            flip: mirror all.
            crop: two uniform draws in [0, 1) that place all crops; needed unless `center_crop`.
        """
        if crop is None and not self.center_crop:
            raise ValueError("A random crop needs its two draws: pass crop=(u, v).")
        views = [self.view(image, crop or (0.5, 0.5)) for image in images]
        sizes = torch.tensor([v.flipped_sizes if flip else v.sizes for v in views], dtype=torch.float32)
        return to_images([v.pixels for v in views], flip), sizes


def to_images(pixels: list[Tensor], flip: bool = False) -> Tensor:
    """Stack uint8 pictures [3,H,W] to float32 images [N,3,H,W] in [0,1], mirrored if `flip`."""
    images = torch.stack(pixels)
    return (images.flip(-1) if flip else images).to(torch.float32).div_(255.0)
