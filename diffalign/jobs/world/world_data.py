"""The embedded world's data: samples of its base model, judged by the oracle and by its reward models."""

import io
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

import reward_models
from diffalign.backbones import loading
from diffalign.errors import DataError
from diffalign.evaluation import SamplingSettings, generate
from diffalign.shapes.captioner import describe
from diffalign.shapes.oracle import Oracle
from diffalign.text_files import read_lines

SAMPLING = SamplingSettings(num_inference_steps=16, guidance_scale=5.0, batch_size=64)


@dataclass(frozen=True, kw_only=True)
class World:
    """Say how large the embedded world of a model is; WORLDS has those that made `assets/`."""

    model: str = "sdxl"  # of `shapes.models.MODELS`
    seed: int = 0
    training_captions: int = 2200  # distinct ones, which the worlds of all models share
    pairs: int = 2200  # of as many captions
    held_out_prompts: int = 400
    candidates: int = 4  # samples a caption, of which the best and the worst become a pair
    tie_gap: float = 0.03  # pairs whose oracle scores are closer become ties
    label_temperature: float = 0.08  # P(label agrees with the oracle) = sigmoid(gap / label_temperature)
    lists: int = 300  # captions whose candidates are kept as a ranked list
    reward_pairs: int = 10_000
    reward_steps: int = 600
    step_aware_steps: int = 400
    lrm_steps: int = 200
    jpeg_quality: int = 95

    @property
    def base(self) -> str:
        """Return the name of the base model and of its folder."""
        return f"tiny-{self.model}"

    def folder(self, assets: Path, kind: str) -> Path:
        """Return the folder of this model's "pairs" or "lists"."""
        return assets / (f"tiny-{kind}" if self.model == "sdxl" else f"{self.base}-{kind}")


# The smaller flow model's samples of a caption are alike: the best and the worst of six tell more than those of four.
WORLDS = {"sdxl": World(), "sd3": World(model="sd3", pairs=800, lists=150, candidates=6, jpeg_quality=90)}


def read_captions(assets: Path) -> list[str]:
    """Return the training captions."""
    file = assets / "prompts" / "tiny-train.txt"
    if not file.is_file():
        raise DataError(f"There is no {file}. Build the part prompts first: diffalign shapes build --parts prompts.")
    return read_lines(file)


def sample(assets: Path, world: World, prompts: list[str], seed: int) -> list[Image.Image]:
    """Draw prompts with the base model, each from the next seed."""
    pipeline = loading.load(assets / world.base).pipeline()
    return generate(pipeline, prompts, [seed + i for i in range(len(prompts))], SAMPLING)


def write_pairs(assets: Path, world: World, console: Console) -> None:
    """Sample the base model, let the oracle choose best and worst, label with noise, write Pick-a-Pic v2's columns."""
    captions = read_captions(assets)[: world.pairs]
    prompts = [caption for caption in captions for _ in range(world.candidates)]
    images = sample(assets, world, prompts, 10_000 + world.seed * len(prompts))
    scores = Oracle().score(images, prompts).view(-1, world.candidates)
    rng = random.Random(world.seed + 3)
    rows = []
    for number, (caption, row) in enumerate(zip(captions, scores, strict=True)):
        own = images[number * world.candidates : (number + 1) * world.candidates]
        best, worst = int(row.argmax()), int(row.argmin())
        rows.append(_labelled(number, caption, own[best], own[worst], float(row[best] - row[worst]), world, rng))
    folder = world.folder(assets, "pairs")
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=256)
    ties = sum(row["label_0"] == 0.5 for row in rows)
    wrong = sum(row["label_0"] == (0.0 if row["image_0_uid"].endswith("best") else 1.0) for row in rows)
    console.print(
        f"{len(rows)} pairs, {ties} ties, {wrong} labels against the oracle; mean oracle score {scores.mean():.3f}"
    )


def _labelled(
    number: int, caption: str, best: Image.Image, worst: Image.Image, gap: float, world: World, rng: random.Random
) -> dict[str, Any]:
    """Make a row: the two images in random order, preferred with a probability that grows with the oracle's gap."""
    prefers_best = rng.random() < 1 / (1 + math.exp(-gap / world.label_temperature))
    label_best = 0.5 if gap < world.tie_gap else float(prefers_best)
    best_first = rng.random() < 0.5
    images, uids = (
        [_jpeg(image, world.jpeg_quality) for image in (best, worst)],
        [f"{number:05d}-best", f"{number:05d}-worst"],
    )
    if not best_first:
        images, uids = images[::-1], uids[::-1]
    label_0 = label_best if best_first else 1 - label_best
    chosen = {1.0: uids[0], 0.0: uids[1]}.get(label_0, "tie")
    return {
        "are_different": label_0 != 0.5,
        "best_image_uid": chosen,
        "caption": caption,
        "has_label": True,
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "jpg_0": images[0],
        "jpg_1": images[1],
        "label_0": label_0,
        "label_1": 1 - label_0,
        "model_0": world.base,
        "model_1": world.base,
        "num_example_per_prompt": 1,
        "ranking_id": number,
        "user_id": 0,
    }


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def write_captions(assets: Path, world: World) -> None:
    """Add to every pair what its two images show, in caption_0 and caption_1 (DCPO)."""
    file = world.folder(assets, "pairs") / "train.parquet"
    rows = pq.read_table(file).to_pylist()
    for row in rows:
        for side in "01":
            row[f"caption_{side}"] = describe(Image.open(io.BytesIO(row[f"jpg_{side}"])), row["caption"])
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=256)


def write_lists(assets: Path, world: World, console: Console) -> None:
    """Sample lists of candidates and keep the scores of three judges for each image (Syn-Pic, RankDPO).

    The judges are a person, the oracle's score with the noise that makes the annotator of the pairs (a logistic
    difference), and the two tiny reward models.
    """
    captions, count = read_captions(assets)[: world.lists], world.candidates
    prompts = [caption for caption in captions for _ in range(count)]
    images = sample(assets, world, prompts, 5_000_000 + world.seed * len(prompts))
    # The difference of two Gumbel numbers is logistic: with this noise a comparison agrees as often as the annotator.
    gumbel = np.random.default_rng(world.seed + 6).gumbel(scale=world.label_temperature, size=len(prompts))
    judges = [reward_models.load(name, assets / f"tiny-{name}") for name in ("pickscore", "hpsv2")]
    exact = Oracle().score(images, prompts).numpy()
    scores = np.stack([exact + gumbel, *(judge.score(images, prompts).numpy() for judge in judges)], axis=1)
    rows = []
    for number, caption in enumerate(captions):
        own = slice(number * count, (number + 1) * count)
        encoded = [_jpeg(image, world.jpeg_quality) for image in images[own]]
        rows.append({"caption": caption, "images": encoded, "scores": scores[own].astype(float).round(6).tolist()})
    folder = world.folder(assets, "lists")
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=64)
    console.print(f"{len(rows)} lists of {count}; mean oracle score {exact.mean():.3f}")
