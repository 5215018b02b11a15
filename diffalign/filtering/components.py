"""The table that selection works on: one row a pair, what is known about it, and where that came from."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffalign.data import PairRow, PairSource, RowError
from diffalign.data.fingerprints import stable_id
from diffalign.errors import DataError
from diffalign.filtering.cleaning import prompt_key
from diffalign.filtering.text_quality import Rating

_METADATA_KEY = b"diffalign"
KEPT_NEIGHBOURS = 5  # distances to so many are stored, so that another k costs nothing


@dataclass
class Components:
    """Hold what is known about every pair of a source, in its order.

    Attributes:
        table: index (in the source), example_id, images_id (the same whoever won), prompt, prompt_key, file and row
            (where it stands); and once they are set score_chosen, score_rejected, text_quality, text_quality_flag,
            distance_1, ..., distance_k.
        origin: what each part was made from: "pairs", "scores", "text_quality", "text_entropy". A part whose origin is
            as wanted need not be made again.
    """

    table: pd.DataFrame
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: PairSource, origin: Any, advance: Callable[[int], None] = lambda count: None) -> Self:
        """List the pairs of a source: reads every image once, to identify it, and decodes none."""
        records = []
        for row in source:
            if not isinstance(row, PairRow):
                raise DataError(f"{source.name} holds no pairs but lists or single images. Only pairs can be filtered.")
            try:
                digests = sorted((row.chosen.digest, row.rejected.digest))
                images_id = stable_id(row.prompt, *digests)
                file, number, *_ = row.chosen.place
                records.append((row.index, row.example_id, images_id, row.prompt, _absolute(file), number))
            except RowError as error:
                source.rejects.add(error)
            advance(1)
        if not records:
            raise DataError(f"{source.name} holds no readable pair: {source.counts}.")
        table = pd.DataFrame(records, columns=["index", "example_id", "images_id", "prompt", "file", "row"])
        table["file"] = table["file"].astype("category")
        table.insert(4, "prompt_key", table["prompt"].map(prompt_key))
        return cls(table, {"pairs": origin})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote. Raises DataError when it is something else."""
        try:
            stored = pq.read_table(path)
            origin = json.loads(stored.schema.metadata[_METADATA_KEY])
            return cls(stored.to_pandas(), origin)
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} was not written by diffalign filter ({error}). Delete it.") from error

    def write(self, path: Path) -> None:
        """Write the table as parquet, keyed by example_id, with the origins in its metadata."""
        table = pa.Table.from_pandas(self.table, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), _METADATA_KEY: json.dumps(self.origin).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)

    def prompts(self) -> list[str]:
        """Return the distinct prompts in order of appearance, as they are written."""
        return list(dict.fromkeys(self.table["prompt"]))

    def distinct_prompts(self) -> list[str]:
        """Return one prompt of each prompt_key, in order of appearance."""
        return self.table.drop_duplicates("prompt_key")["prompt"].tolist()

    def set_scores(self, scores: pd.DataFrame, origin: Any) -> int:
        """Enter score_chosen and score_rejected by example_id; return how many pairs have none.

        Raises:
            DataError: not one pair has scores.
        """
        found = scores.reindex(self.table["example_id"])
        missing = int(found["score_chosen"].isna().sum())
        if missing == len(found):
            raise DataError(
                f"None of the {len(found)} pairs is among the {len(scores)} scores: they belong to other data. "
                "Score these pairs with `diffalign score --pairs`, or name a scorer with --scorer."
            )
        for name in ("score_chosen", "score_rejected"):
            self.table[name] = found[name].to_numpy()
        self.origin["scores"] = origin
        return missing

    def set_quality(self, ratings: dict[str, Rating], origin: Any) -> None:
        """Enter text_quality and text_quality_flag by prompt."""
        found = [ratings[prompt] for prompt in self.table["prompt"]]
        self.table["text_quality"] = [rating.score for rating in found]
        self.table["text_quality_flag"] = [rating.flag for rating in found]
        self.origin["text_quality"] = origin

    def set_distances(self, distances: NDArray[np.float64], origin: Any) -> None:
        """Enter distances [P, k] to the nearest neighbours of each of `distinct_prompts`."""
        prompt_of, _ = pd.factorize(self.table["prompt_key"])
        stale = [name for name in self.table if name.startswith("distance_")]
        self.table = self.table.drop(columns=stale)
        for k, column in enumerate(distances.T, 1):
            self.table[f"distance_{k}"] = column[prompt_of]
        self.origin["text_entropy"] = origin


def _absolute(file: str) -> str:
    """Return the absolute path of a file, so that it is found from elsewhere; other names as they are."""
    return os.path.abspath(file) if os.path.exists(file) else file
