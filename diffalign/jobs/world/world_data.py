"""The embedded world's data: samples of its models, judged by the oracle and by its reward models."""

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
from diffalign.errors import DataError
from diffalign.evaluation import SamplingSettings
from diffalign.jobs.world.generators import Generator, choose, draw
from diffalign.shapes.captioner import describe
from diffalign.shapes.oracle import Oracle
from diffalign.text_files import read_lines

SAMPLING = SamplingSettings(num_inference_steps=16, guidance_scale=2.5, batch_size=64)


@dataclass(frozen=True, kw_only=True)
class World:
    """Say how large the embedded world of a model is; WORLDS has those that made `assets/`."""

    model: str = "sdxl"  # of `shapes.models.MODELS`
    seed: int = 0
    training_captions: int = 2200  # distinct ones, which the worlds of all models share
    pairs: int = 2000  # of as many captions
    held_out_prompts: int = 400
    candidates: int = 4  # samples a caption of a list
    tie_gap: float = 0.03  # pairs whose oracle scores are closer become ties
    label_temperature: float = 0.08  # P(label agrees with the oracle) = sigmoid(gap / label_temperature)
    lists: int = 200  # captions whose candidates are kept as a ranked list
    reward_pairs: int = 10_000
    reward_steps: int = 600
    step_aware_steps: int = 400
    lrm_steps: int = 200
    jpeg_quality: int = 90
    generators: Path = Path("build/generators")  # the models beside the base, which are not shipped

    @property
    def base(self) -> str:
        """Return the name of the base model and of its folder."""
        return f"tiny-{self.model}"

    def model_folder(self, assets: Path, kind: str) -> Path:
        """Return the folder of the "base", the "early" or the "strong" model."""
        return assets / self.base if kind == "base" else self.generators / f"{self.base}-{kind}"

    def folder(self, assets: Path, kind: str) -> Path:
        """Return the folder of this model's "pairs" or "lists"."""
        return assets / (f"tiny-{kind}" if self.model == "sdxl" else f"{self.base}-{kind}")


WORLDS = {"sdxl": World(), "sd3": World(model="sd3", pairs=1500, lists=150, candidates=6)}


def read_captions(assets: Path) -> list[str]:
    """Return the training captions."""
    file = assets / "prompts" / "tiny-train.txt"
    if not file.is_file():
        raise DataError(f"There is no {file}. Build the part prompts first: diffalign shapes build --parts prompts.")
    return read_lines(file)


def sample(
    assets: Path, world: World, prompts: list[str], seed: int, rng: random.Random
) -> tuple[list[Image.Image], list[Generator]]:
    """Draw each prompt from the next seed, by a generator chosen at random; return the pictures and who drew them."""
    by = choose(len(prompts), rng)
    folders = {kind: world.model_folder(assets, kind) for kind in ("base", "early", "strong")}
    return draw(folders, prompts, [seed + i for i in range(len(prompts))], by, SAMPLING), by


@dataclass(frozen=True)
class Picture:
    """Hold one side of a pair: the picture, what the oracle thinks of it, and who drew it."""

    image: Image.Image
    score: float
    by: Generator


def write_pairs(assets: Path, world: World, console: Console) -> None:
    """Draw two pictures a caption, let the noisy annotator choose, write Pick-a-Pic v2's columns."""
    captions = read_captions(assets)[: world.pairs]
    prompts = [caption for caption in captions for _ in range(2)]
    rng = random.Random(world.seed + 3)
    images, by = sample(assets, world, prompts, 10_000 + world.seed * len(prompts), rng)
    scores = Oracle().score(images, prompts).tolist()
    shown = [Picture(*picture) for picture in zip(images, scores, by, strict=True)]
    pairs = list(zip(shown[::2], shown[1::2], strict=True))
    rows = [_labelled(number, captions[number], pair, world, rng) for number, pair in enumerate(pairs)]
    folder = world.folder(assets, "pairs")
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet", row_group_size=256)
    labels = np.array([row["label_0"] for row in rows])
    gaps = np.array([first.score - second.score for first, second in pairs])
    wrong = ((labels - 0.5) * gaps < 0).sum()
    console.print(
        f"{len(rows)} pairs, {(labels == 0.5).sum()} ties, {wrong} labels against the oracle; "
        f"mean oracle score {np.mean(scores):.3f}"
    )


def _labelled(
    number: int, caption: str, pair: tuple[Picture, Picture], world: World, rng: random.Random
) -> dict[str, Any]:
    """Make a row: the first image is preferred with a probability that grows with the oracle's gap."""
    gap = pair[0].score - pair[1].score
    prefers_first = rng.random() < 1 / (1 + math.exp(-gap / world.label_temperature))
    label = 0.5 if abs(gap) < world.tie_gap else float(prefers_first)
    uids = [f"{number:05d}-{side}" for side in "01"]
    row = {
        "are_different": label != 0.5,
        "best_image_uid": {1.0: uids[0], 0.0: uids[1]}.get(label, "tie"),
        "caption": caption,
        "has_label": True,
        "label_0": label,
        "label_1": 1 - label,
        "num_example_per_prompt": 1,
        "ranking_id": number,
        "user_id": 0,
    }
    for side, picture in enumerate(pair):
        row |= {
            f"image_{side}_uid": uids[side],
            f"jpg_{side}": _jpeg(picture.image, world.jpeg_quality),
            f"model_{side}": picture.by.model(world.base),
            f"guidance_{side}": picture.by.guidance,
        }
    return row


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
    images, _ = sample(assets, world, prompts, 5_000_000 + world.seed * len(prompts), random.Random(world.seed + 7))
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
