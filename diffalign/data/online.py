"""Training batches without a cache: decode and encode while training."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffalign.data.batch import Augment, PairEncoder, PreferenceBatch, as_float32
from diffalign.data.cache import as_mask, as_preference
from diffalign.data.pairs import Example, RowError
from diffalign.data.source import PairSource
from diffalign.data.transforms import PairTransform
from diffalign.errors import DataError


class OnlinePairs:
    """Serve the batches of LatentCache straight from a source: for random crops, streams and small experiments.

    Args:
        source: the pairs. With on_error="skip", a pair with a broken image is replaced by the next usable one, so that
            batches keep their size and remain a function of the indices.
        encoder: VAE and text encoders (a Backbone).
        transform: geometry.
        workers: threads that decode images; default: up to 8.
    """

    def __init__(
        self, source: PairSource, encoder: PairEncoder, transform: PairTransform, *, workers: int | None = None
    ):
        self.source, self.encoder, self.transform = source, encoder, transform
        self._pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.source)

    @property
    def has_preference(self) -> bool | None:
        """Tell whether some pairs carry a soft label; None: not known before reading."""
        return self.source.has_preference

    @property
    def images_per_example(self) -> int:
        """Return k; a stream of lists is read up to its first to know."""
        return self.source.images_per_example or len(self.source[0].images)

    @cached_property
    def example_ids(self) -> np.ndarray:
        """Return the ids [P]. Reads and hashes every image once."""
        return np.array([self._readable(index).example_id for index in range(len(self))], dtype=np.int64)

    def readable_ids(self) -> np.ndarray:
        """Return the ids [P], negative ones for examples that cannot be read; these are not reported."""
        return np.array([self._id_or(index, -1 - index) for index in range(len(self))], dtype=np.int64)

    def batch(self, indices: Sequence[int], augment: Augment) -> PreferenceBatch:
        """Read, cut and encode B examples, augmented as `augment` says for their example ids; float32 on the CPU."""
        read = self._rows(indices)
        drawn = augment(torch.tensor([row.example_id for row in read], dtype=torch.int64))
        flip = as_mask(drawn.flips, len(read), "flips")
        drop = as_mask(drawn.drop_caption, len(read), "drop_caption")
        if flip.any() and not self.transform.random_flip:
            raise DataError("The transform forbids mirroring: set random_flip, or do not flip.")
        if drawn.crops is None and not self.transform.center_crop:
            raise ValueError("A random crop needs its draws: set crops [B,2].")
        random_crop = not self.transform.center_crop
        places = [tuple(map(float, crop)) for crop in drawn.crops] if random_crop else [None] * len(read)
        cut = self._cut(read, flip, places)
        rows = [row for row, *_ in cut]
        # [B,k,...] to the first images of all, then the second ones.
        images = torch.stack([images for _, images, _ in cut], dim=1).flatten(0, 1)
        sizes = torch.stack([sizes for *_, sizes in cut], dim=1).flatten(0, 1)
        shown = [("",) * len(r.prompts) if dropped else r.prompts for r, dropped in zip(rows, drop, strict=True)]
        prompts = [prompt for image in zip(*shown, strict=True) for prompt in image]
        with torch.no_grad():
            mean, std = (moment.cpu().to(torch.float32) for moment in self.encoder.encode_images(images))
            text = self._encode_prompts(prompts)
        return PreferenceBatch(
            example_ids=torch.tensor([row.example_id for row in rows], dtype=torch.int64),
            latent_mean=mean,
            latent_std=std,
            text=text,
            sizes=sizes,
            preference=self._preference(rows),
            prompts=prompts,
            scores=_scores(rows),
            noises=_noises(rows) if self.source.has_noises else None,
        )

    def _cut(self, read: list[Example], flip: np.ndarray, places: list) -> list[tuple[Example, Tensor, Tensor]]:
        """Decode and transform on threads; replace unusable pairs where that is allowed."""
        tasks = []
        for row, mirrored, place in zip(read, flip, places, strict=True):
            tasks.append((row, mirrored, place, self._pool.submit(self._transform, row, mirrored, place)))
        cut = []
        for row, mirrored, place, task in tasks:
            try:
                cut.append((row, *task.result()))
            except RowError as error:
                self.source.rejects.add(error)
                cut.append(self._substitute(row.index, mirrored, place))
        return cut

    def _rows(self, indices: Sequence[int]) -> list[Example]:
        try:
            rows = self.source.rows(list(indices))
            list(self._pool.map(_hashed, rows))
        except RowError:
            return [self._readable(index) for index in indices]
        return rows

    def _readable(self, index: int) -> Example:
        for step in range(len(self.source)):
            try:
                return _hashed(self.source[(index + step) % len(self.source)])
            except RowError as error:
                self.source.rejects.add(error)
        raise DataError(f"No pair of {self.source.name} can be read: {self.source.counts}.")

    def _id_or(self, index: int, default: int) -> int:
        try:
            return self.source[index].example_id
        except RowError:
            return default

    def _substitute(self, index: int, flip: bool, place: tuple | None) -> tuple[Example, Tensor, Tensor]:
        for step in range(1, len(self.source)):
            row = self._readable((index + step) % len(self.source))
            try:
                return row, *self._transform(row, flip, place)
            except RowError as error:
                self.source.rejects.add(error)
        raise DataError(f"No pair of {self.source.name} has usable images: {self.source.counts}.")

    def _transform(self, row: Example, flip: bool, place: tuple | None) -> tuple[Tensor, Tensor]:
        return self.transform(*(image.load() for image in row.images), flip=flip, crop=place)

    def _encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode each distinct prompt once."""
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        columns = self.encoder.encode_prompts(distinct)
        return {name: as_float32(column.cpu())[rows] for name, column in columns.items()}

    def _preference(self, rows: list[Example]) -> Tensor | None:
        soft = np.array([np.nan if row.preference is None else row.preference for row in rows])
        if self.has_preference is False or (self.has_preference is None and np.isnan(soft).all()):
            return None
        return as_preference(soft)


def _scores(rows: list[Example]) -> Tensor | None:
    """Return the scores [B,k] float32, or None where there are none."""
    scores = np.array([row.scores for row in rows], dtype=np.float32)
    return None if np.isnan(scores).all() else torch.from_numpy(scores)


def _noises(rows: list[Example]) -> list[str | None]:
    """Return what the images were drawn from [N], in the order of a batch."""
    known = [row.noises or (None,) * len(row.images) for row in rows]
    return [noise for images in zip(*known, strict=True) for noise in images]


def _hashed(row: Example) -> Example:
    """Return the row after its images were read and hashed. Raises RowError when a file is gone."""
    row.example_id  # noqa: B018 (kept by the row)
    return row
