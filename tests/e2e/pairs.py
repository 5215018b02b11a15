"""Preference pairs made on the spot, in Pick-a-Pic v2's columns."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


def write_pairs(
    folder: Path, number: int, side: int = 64, captions: bool = False, noises: bool = False, latents: str = "16x16x16"
) -> Path:
    """Write pairs of coloured images with noise; the winner is the brighter one, and every seventh row is a tie.

    With `captions`, each image has one of its own as well, in caption_0 and caption_1; with `noises`, it is said to be
    drawn from noise of the shape `latents`, by a seed of its own.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(number):
        noise = torch.rand(2, side, side, 3, generator=generator) * 60
        images = [_png(noise[k] + 60 + 90 * k) for k in (0, 1)]
        label_0 = 0.5 if index % 7 == 6 else 0.0
        rows.append(
            {
                "caption": f"a {('red', 'green', 'blue')[index % 3]} circle",
                "jpg_0": images[0],
                "jpg_1": images[1],
                "label_0": label_0,
                "label_1": 1 - label_0,
                **({f"noise_{k}": noise_of(2 * index + k, latents) for k in (0, 1)} if noises else {}),
                **({"caption_0": "a dark circle", "caption_1": f"a bright circle {index}"} if captions else {}),
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def noise_of(seed: int, latents: str = "16x16x16") -> str:
    """Say what a picture was drawn from."""
    return f"seed={seed} shape={latents} dtype=float32 generator=cpu"


def write_lists(folder: Path, number: int, k: int, side: int = 64) -> Path:
    """Write lists of k images, each brighter than the one before, with the scores of two judges that half agree."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(number):
        noise = torch.rand(k, side, side, 3, generator=generator) * 60
        images = [_png(noise[i] + 40 + 60 * i) for i in range(k)]
        scores = [[float(i), float(torch.rand((), generator=generator))] for i in range(k)]
        rows.append({"caption": f"a circle {index % 3}", "images": images, "scores": scores})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def _png(pixels: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
