"""Small real things for the tests of diffalign.data: pictures, parquet files and an encoder with fixed weights."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn


def picture(seed: int, size: tuple[int, int] = (24, 16), format: str = "PNG") -> bytes:
    """Return an encoded picture (width, height) with structure in both directions."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def rows(count: int, start: int = 0, **columns) -> list[dict]:
    """Return rows of Pick-a-Pic's schema; every third prompt repeats and losers are the next pair's winners."""
    made = []
    for i in range(start, start + count):
        first = i % 2 == 0
        made.append(
            {
                "jpg_0": picture(i if first else i + 1),
                "jpg_1": picture(i + 1 if first else i),
                "label_0": float(first),
                "label_1": float(not first),
                "caption": f"prompt {i // 3}",
                "model_0": "one",
                "model_1": "two",
                **columns,
            }
        )
    return made


def list_rows(count: int, k: int = 3, scorers: int = 2, start: int = 0) -> list[dict]:
    """Return lists of k pictures with scores [k][scorers]; the order by scores differs from list to list."""
    made = []
    for i in range(start, start + count):
        order = np.random.default_rng(i).permutation(k)
        scores = [[float(rank) + 0.1 * r for r in range(scorers)] for rank in order]
        images = [picture(100 + k * i + j) for j in range(k)]
        made.append({"caption": f"prompt {i // 2}", "images": images, "scores": scores, "source": "made"})
    return made


def write_parquet(path: Path, data: list[dict], rows_per_group: int = 3) -> Path:
    """Write rows with small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(data), path, row_group_size=rows_per_group)
    return path


def log_of(path: Path) -> list[dict]:
    """Return the lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class TinyEncoder(nn.Module):
    """Encode images with a strided convolution and prompts with byte embeddings; weights are fixed by the seed."""

    def __init__(
        self,
        seed: int = 0,
        text_columns: tuple[str, ...] = ("prompt_embeds", "pooled_prompt_embeds"),
        token_columns: tuple[str, ...] = (),
        ignores_padding: bool = False,
        image_delay: float = 0.0,
        prompt_delay: float = 0.0,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.moments = nn.Conv2d(3, 8, 4, stride=4)
        self.bytes = nn.Embedding(256, 6)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.seed, self.text_columns = seed, text_columns
        self.token_columns, self.ignores_padding = token_columns, ignores_padding
        self.image_delay, self.prompt_delay = image_delay, prompt_delay
        self.image_batches: list[int] = []
        self.prompt_batches: list[list[str]] = []

    def fingerprint(self) -> str:
        return f"tiny {self.seed}"

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(self.image_delay)
        self.image_batches.append(len(images))
        mean, spread = self.moments(images).chunk(2, dim=1)
        return mean, spread.sigmoid()

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        time.sleep(self.prompt_delay)
        self.prompt_batches.append(prompts)
        padded = torch.tensor([list(prompt.encode()[:10].ljust(10, b"\0")) for prompt in prompts])
        embeds = self.bytes(padded)
        every = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds.mean(1), "prompt_embeds_mask": padded > 0}
        return {name: every[name] for name in self.text_columns}
