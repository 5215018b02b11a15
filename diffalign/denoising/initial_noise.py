"""The noise that a picture was drawn from: said in a line of text from which it is drawn again, bit for bit.

Pipelines of diffusers start from `torch.randn` of a generator that was seeded for the picture. On the CPU its numbers
depend on the seed, the shape and the type alone, so these are all that is kept. A generator on a GPU gives numbers that
depend on the GPU: such noise cannot be drawn again elsewhere, and is refused.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from diffalign.errors import DataError

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEVICE = "cpu"
FORM = re.compile(r"seed=(\d+) shape=(\d+)x(\d+)x(\d+) dtype=(\w+) generator=(\w+)(?: patches=(\d+))?")
EXAMPLE = "seed=7 shape=16x128x128 dtype=bfloat16 generator=cpu"
LARGEST_SEED = 2**64 - 1
MAKE_THEM = (
    "diffalign generate MODEL --prompts FILE --seeds 0-7 --out DRAWN; diffalign score DRAWN --with pickscore --out "
    "scores.parquet; diffalign rank scores.parquet --as pairs --out pairs.parquet"
)


@dataclass(frozen=True)
class InitialNoise:
    """Say how the noise of one picture was drawn.

    Args:
        seed: of the generator, made for this picture alone.
        shape: C, h, w of the latents, as they are before any packing.
        dtype: type that was drawn, of TYPES.
        patches: side of the patches whose latents were drawn as channels of one place (FLUX.2: 2); 1 elsewhere.

    Example:
        >>> noise = InitialNoise.parse("seed=7 shape=4x2x2 dtype=float32 generator=cpu")
        >>> torch.equal(noise.draw()[None], torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(7)))
        True
    """

    seed: int
    shape: tuple[int, int, int]
    dtype: str = "float32"
    patches: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote.

        Raises:
            DataError: it is written otherwise, or names noise that cannot be drawn here.
        """
        match = FORM.fullmatch(text.strip())
        if match is None:
            raise DataError(f'The noise of a picture is {text!r}, expected as in "{EXAMPLE}".')
        seed, *sides, dtype, device, patches = match.groups()
        if device != DEVICE:
            raise DataError(
                f"A picture was drawn by a generator on {device} ({text}): its numbers depend on the GPU and cannot be "
                f"drawn again. Draw with generators on the CPU, as diffalign does: {MAKE_THEM}"
            )
        if dtype not in TYPES or int(seed) > LARGEST_SEED or "0" in sides:
            known = ", ".join(TYPES)
            raise DataError(f"The noise {text!r} must have sides above 0, a seed below 2^64 and a dtype of {known}.")
        shape, side = (int(sides[0]), int(sides[1]), int(sides[2])), int(patches or 1)
        if side == 0 or shape[1] % side or shape[2] % side:
            raise DataError(f"The noise {text!r} has sides that its patches do not divide.")
        return cls(int(seed), shape, dtype, side)

    def __str__(self) -> str:
        patches = f" patches={self.patches}" if self.patches > 1 else ""
        return f"seed={self.seed} shape={_sides(self.shape)} dtype={self.dtype} generator={DEVICE}{patches}"

    def draw(self) -> Tensor:
        """Draw the noise [C,h,w], float32 from the type it was drawn in."""
        generator, (channels, height, width), side = torch.Generator().manual_seed(self.seed), self.shape, self.patches
        shape = 1, channels * side**2, height // side, width // side
        return pixel_shuffle(torch.randn(shape, generator=generator, dtype=TYPES[self.dtype]), side)[0].float()


def require_noises(noises: Sequence[str | None] | None, shape: Sequence[int], name: str) -> list[InitialNoise]:
    """Return how the noise of N pictures was drawn.

    Args:
        noises: as text; None where it is not known.
        shape: [C,h,w] of the latents of this run.
        name: of the data.

    Raises:
        DataError: it is not known of all pictures, or of another shape.
    """
    unknown = [noise for noise in noises or [None] if not noise]
    if noises is None or unknown:
        how_many = "what its pictures were" if noises is None else f"what {len(unknown)} of {len(noises)} pictures were"
        raise DataError(
            f"{name} does not say {how_many} drawn from (columns noise_0 and noise_1), and each is to be trained with "
            f"its own noise. Pictures that you draw have it: {MAKE_THEM}"
        )
    known = {text: InitialNoise.parse(text) for text in dict.fromkeys(noises)}
    wrong = next((noise for noise in known.values() if noise.shape != tuple(shape)), None)
    if wrong is not None:
        raise DataError(
            f"{name} holds a picture drawn from noise of {_sides(wrong.shape)}, and the latents of this run are "
            f"{_sides(shape)}: channels, height, width. {_advice(wrong.shape, shape)}"
        )
    return [known[text] for text in noises]


def draw_noises(noises: Sequence[str | None] | None, shape: Sequence[int], name: str = "The data") -> Tensor:
    """Draw the noise of N pictures [N,C,h,w] float32, on the CPU; raise DataError as `require_noises` does."""
    return torch.stack([noise.draw() for noise in require_noises(noises, shape, name)])


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _advice(found: Sequence[int], wanted: Sequence[int]) -> str:
    if found[0] != wanted[0]:
        return "The pictures are of a model with another VAE: draw them with the model that is trained."
    if found[1] != found[2]:
        return "Only square pictures can be trained on: draw them square."
    factor = math.gcd(found[1], wanted[1])
    up, down = found[1] // factor, wanted[1] // factor
    return (
        "A picture must be neither resized nor cropped to be what its noise led to: multiply data.resolution by "
        f"{up}/{down}, or draw with another --height and --width."
    )
