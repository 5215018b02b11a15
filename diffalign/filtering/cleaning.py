"""Before ranking: what counts as the same prompt, pairs judged twice, and a validation split by prompt."""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffalign.errors import DataError


def prompt_key(prompt: str) -> str:
    """Return what prompts have in common that differ in case and spaces only: CLIP's tokenizer reads them alike."""
    return " ".join(prompt.casefold().split())


@dataclass(frozen=True)
class Deduped:
    """Tell which pairs stay [N], how many repeat another, and how many are contradicted as often as confirmed."""

    keep: NDArray[np.bool_]
    repeated: int
    contradicted: int


def dedupe(pairs: pd.DataFrame) -> Deduped:
    """Keep one pair of each prompt and two images: the first with the winner that most of its repetitions name.

    Where both winners are named equally often none is kept: the label carries no information.

    Args:
        pairs: example_id (prompt and both images, winner first) and images_id (prompt and both images in any order).
    """
    votes = pairs.groupby(["images_id", "example_id"], sort=False).size().reset_index(name="votes")
    most = votes.groupby("images_id")["votes"].transform("max")
    winners = votes[votes["votes"] == most]
    decided = winners[~winners["images_id"].duplicated(keep=False)]
    keep = pairs["example_id"].isin(decided["example_id"]) & ~pairs["example_id"].duplicated()
    undecided = pairs["images_id"].isin(set(votes["images_id"]) - set(decided["images_id"]))
    return Deduped(keep.to_numpy(), int((~keep & ~undecided).sum()), int(undecided.sum()))


def held_out(prompt_keys: pd.Series, share: float, seed: int = 0) -> NDArray[np.bool_]:
    """Return which pairs [N] belong to the validation set: all pairs of about `share` of the prompts.

    The side of a prompt is a pure function of the prompt and the seed, whatever else the data holds.

    Raises:
        DataError: the share is not in [0, 1), or it leaves one side without pairs.
    """
    if not 0 <= share < 1:
        raise DataError(f"--validation must be a share of the prompts in [0, 1), got {share}.")
    if share == 0:
        return np.zeros(len(prompt_keys), dtype=bool)
    numbers, keys = pd.factorize(prompt_keys)
    hashes = (blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest() for key in keys)
    side = np.array([int.from_bytes(digest, "big") / 2**64 < share for digest in hashes])
    if side.all() or not side.any():
        raise DataError(
            f"--validation {share} holds out {int(side.sum())} of {len(keys)} prompts. Use another share or --seed."
        )
    return side[numbers]
