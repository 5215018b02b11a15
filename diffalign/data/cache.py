"""Latents and prompt embeddings computed once, memory-mapped afterwards."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from diffalign.data import checksums
from diffalign.data.batch import Augment, PairEncoder, PreferenceBatch, as_float32
from diffalign.data.cache_build import NOISES, STORED, CacheBuilder
from diffalign.data.cache_store import COMPLETE, AppendStore, exclusive, read_json
from diffalign.data.rejects import from_record
from diffalign.data.source import PairSource
from diffalign.data.text_store import PADDED, TextColumns, count, mapped
from diffalign.data.transforms import PairTransform
from diffalign.errors import DataError, suggestion
from diffalign.progress import waiting

FORMAT = 2  # raise it whenever the files or the numbers in them change
META, LATENTS = "meta.json", "latents.npy"


class LatentCache:
    """Serve batches of a data set whose images and prompts were encoded beforehand.

    A cache lies in a folder named after a hash of all it depends on: encoder weights, transform, stored precision and
    the bytes of the data. Whatever changes leads to another folder, so a cache cannot be out of date. Each distinct
    image is held once, as mean and standard deviation of the VAE's posterior (and those of its mirror image).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = _verified(folder)
        self.transform = PairTransform(**self.meta["transform"])
        self.has_preference: bool = self.meta["has_preference"]
        self.images_per_example: int = self.meta["images_per_example"]
        self.prompts: list[str] = _lines(folder / "prompts.jsonl")
        self.noises = _lines(folder / NOISES) if NOISES in self.meta["files"] else None  # of every row of latents
        self._latents = mapped(folder / LATENTS)
        self._checksums = checksums.open_for(folder / LATENTS, len(self._latents))
        self._text = TextColumns(folder, _text_columns(self.meta), self.meta)
        self._sizes = np.load(folder / "sizes.npy")
        self.example_ids = np.load(folder / "example_ids.npy")  # [P]
        self.source_index = np.load(folder / "source_index.npy")  # [P]: where an example stands in its source
        self.image_rows = np.load(folder / "pair_images.npy")  # [P,k] rows of latents, best image first
        self.prompt_rows = np.load(folder / "pair_prompts.npy")  # [P,k] rows of the text columns; row 0 is ""
        # [P] P(winner preferred), NaN for plain winners, and [P,k], higher is better; None if the data has none.
        self.preference = np.load(folder / "preference.npy") if self.has_preference else None
        self.scores = np.load(folder / "scores.npy") if self.meta["has_scores"] else None

    @classmethod
    def build(
        cls,
        source: PairSource,
        encoder: PairEncoder,
        transform: PairTransform,
        directory: str | Path,
        *,
        dtype: str = "float16",
        text_dtype: str | None = None,
        batch_size: int = 8,
        progress: bool = True,
        announce: bool = True,
        workers: int | None = None,
    ) -> Self:
        """Encode a data set, or what is missing of it, and open the result; a finished cache is just opened.

        A build can be killed at any time and continues when run again, with bit-identical results. Several processes
        may call this at once: one builds, the others wait.

        Args:
            source: the pairs. Broken images raise, or are skipped if the source was opened with on_error="skip".
            encoder: VAE and text encoders (a Backbone).
            transform: geometry; with random_flip, mirrored images are encoded as well.
            directory: where caches lie, each in a folder of its own.
            dtype: stored precision, "float16", "bfloat16" or "float32".
            text_dtype: that of the prompts; None: the same.
            batch_size: images encoded at once.
            progress: show how far the encoding is; of several processes one encodes.
            announce: say that identities are computed first, which every process does.
            workers: threads that decode images; default: up to 8.

        Raises:
            DataError: unusable rows (unless skipped), a full disk, values that are not finite, a random crop.
        """
        text_dtype = text_dtype or dtype
        for given in (dtype, text_dtype):
            if given not in STORED:
                known = ", ".join(STORED)
                raise DataError(f'Unknown cache dtype "{given}".{suggestion(given, STORED)} Available: {known}.')
        if not transform.center_crop:
            raise DataError("A random crop cannot be cached: set center_crop, or train without a cache (OnlinePairs).")
        if batch_size < 1:
            raise DataError(f"The cache's batch_size must be at least 1, got {batch_size}.")
        with waiting("hashing models and data", progress and announce):
            fields = cls.fields(source, encoder, transform, dtype, directory, text_dtype)
        folder = Path(directory) / _key(fields)[:16]
        with exclusive(folder):
            if not (folder / COMPLETE).exists():
                workers = workers or min(8, os.cpu_count() or 1)
                settings = {"batch_size": batch_size, "workers": workers, "progress": progress}
                with AppendStore(folder) as store:
                    store.describe(META, fields)
                    builder = CacheBuilder(
                        source, encoder, transform, store, dtype=dtype, text_dtype=text_dtype, **settings
                    )
                    builder.run()
                    store.finish(_summary(store, encoder), drop=["skipped.jsonl"])
        cache = cls(folder)
        for record in cache.meta["skipped"]:
            source.rejects.add(from_record(record))  # raises if this source does not allow rows to be left out
        return cache

    @staticmethod
    def fields(
        source: PairSource,
        encoder: PairEncoder,
        transform: PairTransform,
        dtype: str,
        directory: str | Path,
        text_dtype: str | None = None,
    ) -> dict[str, Any]:
        """Return everything a cache depends on; its hash names the folder."""
        # Said only where they differ: a cache from before they were told apart keeps its folder.
        text = {} if text_dtype in (None, dtype) else {"text_dtype": text_dtype}
        if encoder.token_columns:
            text["token_columns"] = list(encoder.token_columns)
        return {
            **text,
            "format": FORMAT,
            "encoder": encoder.fingerprint(),
            "transform": transform.identity,
            "dtype": dtype,
            "source": source.identify(Path(directory) / "content_hashes.sqlite"),
        }

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Open a finished cache: its own folder, or a directory that holds just one. Raises DataError otherwise."""
        directory = Path(directory)
        if (directory / META).exists():
            return cls(directory)
        folders = sorted(path.parent for path in directory.glob(f"*/{META}"))
        if len(folders) == 1:
            return cls(folders[0])
        if folders:
            listed = "; ".join(_describe(folder) for folder in folders)
            raise DataError(f"{directory} holds {len(folders)} caches. Open one of them: {listed}.")
        raise DataError(f"There is no latent cache in {directory}. Build one first.")

    def __len__(self) -> int:
        return len(self.example_ids)

    def __reduce__(self):
        return type(self), (self.folder,)  # worker processes map the files anew instead of copying them

    def batch(self, indices: Sequence[int], augment: Augment) -> PreferenceBatch:
        """Gather B examples as float32 tensors on the CPU, augmented as `augment` says for their example ids."""
        index = np.asarray(indices, dtype=np.int64)
        return self.gather(
            self.example_ids[index],
            self.image_rows[index],
            self.prompt_rows[index],
            augment,
            preference=None if self.preference is None else self.preference[index],
            scores=None if self.scores is None else self.scores[index],
        )

    def gather(
        self,
        example_ids: np.ndarray,
        images: np.ndarray,
        prompts: np.ndarray,
        augment: Augment,
        *,
        preference: np.ndarray | None = None,
        scores: np.ndarray | None = None,
    ) -> PreferenceBatch:
        """Make a batch of B examples from any rows of the cache.

        `example_ids` [B] key the augmentation, `images` [B,k] are rows of the latents, `prompts` [B,k] of the text
        columns; `preference` [B] and `scores` [B,k] are passed on.
        """
        ids = torch.from_numpy(np.asarray(example_ids, dtype=np.int64))
        drawn, k = augment(ids), images.shape[1]
        flip = as_mask(drawn.flips, len(ids), "flips")
        drop = as_mask(drawn.drop_caption, len(ids), "drop_caption")
        if flip.any() and not self.transform.random_flip:
            raise DataError("The cache holds no mirrored images: set random_flip and build it again, or do not flip.")
        rows, variant = images.T.reshape(-1), np.tile(flip.astype(np.int64), k)
        captions = np.where(drop, 0, prompts.T).reshape(-1)
        distinct, of = np.unique(captions, return_inverse=True)  # images mostly share their caption: read it once
        stored = self._latents[rows, variant]
        if self._checksums is not None:
            checksums.require(stored, self._checksums[rows, variant], self.folder / LATENTS)
        moments = _tensor(stored, self.meta["dtype"])
        return PreferenceBatch(
            example_ids=ids,
            latent_mean=moments[:, 0].contiguous(),
            latent_std=moments[:, 1].contiguous(),
            text={name: self._text_tensor(column)[of] for name, column in self._text.rows(distinct).items()},
            sizes=torch.from_numpy(self._sizes[rows, variant].astype(np.float32)),
            preference=None if preference is None else as_preference(preference),
            prompts=[self.prompts[caption] for caption in captions],
            scores=None if scores is None else torch.from_numpy(np.asarray(scores, dtype=np.float32)),
            noises=None if self.noises is None else [self.noises[row] for row in rows],
        )

    def _text_tensor(self, stored: np.ndarray) -> Tensor:
        return _tensor(stored, self.meta.get("text_dtype", self.meta["dtype"]))


def _tensor(stored: np.ndarray, dtype: str) -> Tensor:
    tensor = torch.from_numpy(stored)
    bits = dtype == "bfloat16" and tensor.dtype == torch.uint16
    return as_float32(tensor.view(torch.bfloat16) if bits else tensor)


def as_mask(values: Tensor | Sequence[bool], count: int, name: str) -> np.ndarray:
    """Return one bool an example. Raises ValueError for any other number of them."""
    mask = np.asarray(values, dtype=bool)
    if mask.shape != (count,):
        raise ValueError(f"{name} must hold one value for each of the {count} examples, got shape {mask.shape}.")
    return mask


def as_preference(values: np.ndarray) -> Tensor:
    """Return P(winner preferred) [B] float32; plain winners, stored as NaN, are certain."""
    return torch.from_numpy(np.where(np.isnan(values), 1.0, values).astype(np.float32))


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def _key(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _summary(store: AppendStore, encoder: PairEncoder) -> dict[str, Any]:
    # Sorted: rows are met in the order of decoding, which differs when a build was interrupted.
    skipped = sorted(store.read_lines("skipped.jsonl"), key=lambda record: (record["file"], record["row"]))
    return {
        "pairs": store.rows("example_ids.npy"),
        "images_per_example": store.arrays["pair_images.npy"]["shape"][0],
        "images": store.rows("latents.npy"),
        "prompts": count(store, encoder.token_columns),
        "text_columns": list(encoder.text_columns),
        **_padding(store, encoder),
        "has_preference": bool(np.isfinite(store.read("preference.npy")).any()),
        "has_scores": bool(np.isfinite(store.read("scores.npy")).any()),
        "counts": store.state["counts"],
        "skipped": skipped,
    }


def _padding(store: AppendStore, encoder: PairEncoder) -> dict[str, Any]:
    """Return how many tokens prompts are padded to, where padding is not kept."""
    if not encoder.token_columns:
        return {}
    return {PADDED: store.state[PADDED], "ignores_padding": encoder.ignores_padding}


def _text_columns(meta: dict[str, Any]) -> list[str]:
    """Return the names of the text columns; caches from before there were names say whether they have a pooled one."""
    return meta.get("text_columns") or ["prompt_embeds", "pooled_prompt_embeds"][: 1 + meta["pooled"]]


def _verified(folder: Path) -> dict[str, Any]:
    """Return what is written about a cache. Raises DataError unless it is complete and undamaged."""
    fields, complete = read_json(folder / META), read_json(folder / COMPLETE)
    if fields is None or complete is None:
        raise DataError(f"The latent cache {folder} is not finished. Run the command that builds it again to continue.")
    if fields.get("format") != FORMAT:
        raise DataError(f"{folder} has format {fields.get('format')}, this version reads {FORMAT}. Build it again.")
    if not _key(fields).startswith(folder.name):
        raise DataError(f"{folder} does not match its {META}: it was edited or renamed. Build the cache again.")
    for name, size in complete["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise DataError(f"{folder / name} has {found} bytes, expected {size}. Delete {folder} and build it again.")
    for name, checksum in complete.get("checksums", {}).items():
        if checksums.of_file(folder / name) != checksum:
            raise checksums.damaged(folder / name)
    return {**fields, **complete}


def _describe(folder: Path) -> str:
    fields = read_json(folder / META) or {}
    transform = fields.get("transform", {})
    state = "" if (folder / COMPLETE).exists() else ", unfinished"
    return f"{folder.name} (resolution {transform.get('resolution')}, {fields.get('dtype')}{state})"
