"""The pairs of pictures a report shows, and how pictures get into the page."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from diffalign.errors import DataError
from diffalign.evaluation.comparison import Comparison, pick_prompts
from diffalign.evaluation.scoring import ImageLike, open_image
from diffalign.webpages import data_uri

Images = Mapping[str, Mapping[tuple[int, int], ImageLike]]  # model -> (prompt_id, seed) -> picture

_LARGEST_SIDE = 512  # of an embedded picture
_PIXEL_ART_SIDE = 128  # pictures up to this size are shown with hard pixels, not blurred


@dataclass(frozen=True)
class Picture:
    """Hold what an <img> needs."""

    source: str
    width: int
    height: int

    @property
    def pixelated(self) -> bool:
        """Whether the picture is so small that smooth scaling would only blur it."""
        return max(self.width, self.height) <= _PIXEL_ART_SIDE


@dataclass(frozen=True)
class Pair:
    """Hold one prompt and seed drawn by both models."""

    prompt: str
    prompt_id: int
    seed: int
    base: Picture
    aligned: Picture
    scores: dict[str, tuple[float, float]]  # scorer -> (base, aligned)
    categories: tuple[str, ...] = ()


def find_image(images: Images, model: str, key: tuple[int, int]) -> ImageLike:
    """Return one picture; raise DataError naming it if it is missing."""
    try:
        return images[model][key]
    except KeyError:
        raise DataError(
            f'There is no picture of "{model}" for prompt {key[0]} with seed {key[1]}. '
            "Pass the pictures that were scored."
        ) from None


def choose_pairs(comparison: Comparison, scorer: str, count: int) -> list[tuple[int, int]]:
    """Return (prompt_id, seed) of up to `count` pairs, best for the aligned model first.

    If not all fit, a third are the largest wins, a third the largest losses and a third evenly spaced in between.
    """
    pairs = comparison.pairs[comparison.pairs["scorer"] == scorer]
    pairs = pairs.sort_values("difference", ascending=False, kind="stable")
    ranks = np.arange(len(pairs))
    if len(ranks) > count:
        ends = count // 3
        inner = ranks[ends : len(ranks) - ends]
        spaced = np.linspace(0, len(inner) - 1, count - 2 * ends).round().astype(int)
        ranks = np.concatenate([ranks[:ends], inner[spaced], ranks[len(ranks) - ends :]])
    chosen = pairs.iloc[ranks]
    return list(zip(chosen["prompt_id"].tolist(), chosen["seed"].tolist(), strict=True))


def choose_examples(comparison: Comparison, scorer: str, count: int) -> list[tuple[int, int]]:
    """Return (prompt_id, seed) of up to `count` prompts from the largest win to the largest loss, their first seed."""
    pairs = comparison.pairs[comparison.pairs["scorer"] == scorer]
    seeds = pairs.groupby("prompt_id", sort=False)["seed"].first()
    return [(prompt_id, int(seeds[prompt_id])) for prompt_id in pick_prompts(comparison, scorer, count)]


def gallery(
    comparison: Comparison,
    images: Images,
    keys: Sequence[tuple[int, int]],
    folder: Path | None,
    categories: Mapping[int, tuple[str, ...]] | None = None,
) -> list[Pair]:
    """Return the pairs of these (prompt_id, seed); pictures are embedded, or linked relative to `folder` if given."""
    names = comparison.base_name, comparison.aligned_name
    rows = comparison.pairs.set_index(["prompt_id", "seed"]).sort_index()
    pairs = []
    for key in keys:
        of_pair = rows.loc[[key]]
        base, aligned = (picture(find_image(images, name, key), folder) for name in names)
        scores = {row.scorer: (row.base, row.aligned) for row in of_pair.itertuples()}
        ordered = {name: scores[name] for name in comparison.scorers}
        kinds = (categories or {}).get(key[0], ())
        prompt = of_pair["prompt"].iloc[0]
        pairs.append(Pair(prompt, *key, base=base, aligned=aligned, scores=ordered, categories=kinds))
    return pairs


def picture(image: ImageLike, folder: Path | None = None) -> Picture:
    """Return a picture embedded as a data URI: lossless when small, else shrunk; or a relative link from `folder`."""
    opened = open_image(image)
    if folder is not None and not isinstance(image, Image.Image):
        return Picture(quote(Path(os.path.relpath(image, folder)).as_posix()), *opened.size)
    stream = io.BytesIO()
    if max(opened.size) <= _PIXEL_ART_SIDE:
        kind = "png"
        opened.save(stream, format="PNG", optimize=True)
    else:
        kind = "webp"
        opened.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        opened.save(stream, format="WEBP", quality=86, method=4)
    return Picture(data_uri(stream.getvalue(), f"image/{kind}"), *opened.size)
