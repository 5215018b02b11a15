"""Score pictures with any number of scorers into one long table."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from PIL import Image

from diffalign.errors import DataError, UserError
from diffalign.progress import progress_bar
from reward_models.pictures import PictureError, decode, read, to_rgb

ImageLike = Image.Image | str | Path


class Scorer(Protocol):
    """Give every picture a number; higher is better."""

    name: str

    def score(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """Return [N] float32, one score per picture."""
        ...


@runtime_checkable
class AttributeScorer(Protocol):
    """Tell, beside a score, what of the caption a picture shows."""

    name: str

    def attributes(self, images: list[Image.Image], prompts: list[str]) -> Mapping[str, torch.Tensor]:
        """Return [N] per attribute, in [0, 1]; NaN where a caption does not mention it."""
        ...


def score_table(
    images: Sequence[ImageLike],
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    *,
    batch_size: int = 32,
    progress: bool = False,
    **columns: Any,
) -> pd.DataFrame:
    """Return prompt_id, prompt, seed, model, scorer, score: one row per picture and scorer.

    Args:
        images: pictures or files; files are opened a batch at a time.
        prompts: one per picture.
        batch_size: pictures decoded at a time and handed to each scorer.
        columns: a value, or one per picture, for `model`, `seed`, `prompt_id` or any further column. By default
            the model is "model", the seed 0, and pictures with the same text share a prompt id.

    Raises:
        DataError: if a file cannot be read, or a scorer returns another shape or numbers that are not finite.
    """
    _check_names(scorers)
    pictures = _picture_table(images, prompts, columns)
    scores: dict[str, list[np.ndarray]] = {scorer.name: [] for scorer in scorers}
    for batch, texts in _opened(images, prompts, batch_size, "Scoring", progress):
        for scorer in scorers:
            values = _as_array(scorer.score(batch, texts), scorer.name, len(batch))
            if not np.isfinite(values).all():
                worst = int((~np.isfinite(values)).argmax())
                raise DataError(f'Scorer "{scorer.name}" gave {values[worst]} to a picture of {texts[worst]!r}.')
            scores[scorer.name].append(values)
    parts = [pictures.assign(scorer=name, score=np.concatenate(values or [[]])) for name, values in scores.items()]
    return pd.concat(parts, ignore_index=True)


def attribute_table(
    images: Sequence[ImageLike],
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    *,
    batch_size: int = 32,
    progress: bool = False,
    **columns: Any,
) -> pd.DataFrame | None:
    """Return the score table's columns plus `attribute` from the scorers that offer attributes; None if none does.

    Attributes a caption does not mention have no row.
    """
    offering = [scorer for scorer in scorers if isinstance(scorer, AttributeScorer)]
    if not offering:
        return None
    _check_names(offering)
    pictures = _picture_table(images, prompts, columns)
    parts = []
    start = 0
    for batch, texts in _opened(images, prompts, batch_size, "Reading attributes", progress):
        rows = pictures.iloc[start : start + len(batch)]
        start += len(batch)
        for scorer in offering:
            for attribute, result in scorer.attributes(batch, texts).items():
                values = _as_array(result, f"{scorer.name}.{attribute}", len(batch))
                parts.append(rows.assign(scorer=scorer.name, attribute=attribute, score=values))
    return pd.concat(parts).dropna(subset=["score"]).reset_index(drop=True)


def format_score(value: float, largest: float | None = None) -> str:
    """Return a score with the decimals that suit its size, or the size of `largest` in its column: 3 to 4 digits."""
    size = abs(value if largest is None else largest)
    decimals = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 0.1 or size == 0 else 4 if size >= 0.01 else 5
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def open_image(image: ImageLike) -> Image.Image:
    """Return an RGB picture from a picture or file; raise DataError naming a file that cannot be read."""
    try:
        return to_rgb(image) if isinstance(image, Image.Image) else decode(read(image))
    except FileNotFoundError as error:
        raise DataError(
            f"The picture {image} does not exist. Draw it again, or point to where it was moved."
        ) from error
    except (OSError, SyntaxError, PictureError) as error:
        raise DataError(f"The picture {image} cannot be read ({error}). Delete it and draw again.") from error


def _opened(
    images: Sequence[ImageLike], prompts: Sequence[str], batch_size: int, description: str, progress: bool
) -> Iterator[tuple[list[Image.Image], list[str]]]:
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    with progress_bar(len(images), description, progress) as advance:
        for start in range(0, len(images), batch_size):
            batch = [open_image(image) for image in images[start : start + batch_size]]
            yield batch, list(prompts[start : start + batch_size])
            advance(len(batch))


def _picture_table(images: Sequence[ImageLike], prompts: Sequence[str], columns: Mapping[str, Any]) -> pd.DataFrame:
    if len(images) != len(prompts):
        raise DataError(f"Got {len(images)} pictures but {len(prompts)} prompts: every picture needs its prompt.")
    table = pd.DataFrame({"prompt_id": pd.factorize(pd.Series(prompts, dtype=object))[0], "prompt": list(prompts)})
    for name, value in ({"seed": 0, "model": "model"} | dict(columns)).items():
        if not isinstance(value, str) and isinstance(value, Sequence | np.ndarray | pd.Series):
            if len(value) != len(images):
                raise DataError(f'Column "{name}" has {len(value)} values for {len(images)} pictures.')
            value = np.asarray(value)
        table[name] = value
    return table


def _check_names(scorers: Sequence[Scorer]) -> None:
    names = [scorer.name for scorer in scorers]
    if not names:
        raise UserError("There is no scorer to score with: name at least one.")
    if len(set(names)) < len(names):
        raise UserError(f"Scorers need different names, got {', '.join(names)}. Rename one or drop the repetition.")


def _as_array(result: Any, name: str, count: int) -> np.ndarray:
    values = torch.as_tensor(result).detach().to("cpu", torch.float64)
    if values.shape != (count,):
        raise DataError(
            f'Scorer "{name}" returned shape {list(values.shape)} for {count} pictures, expected [{count}].'
        )
    return values.numpy()
