"""A cache of pairs, seen as single images that are desirable or not (Diffusion-KTO)."""

from collections.abc import Sequence

import numpy as np

from diffalign.data.batch import Augment, PreferenceBatch
from diffalign.data.cache import LatentCache
from diffalign.data.fingerprints import stable_id
from diffalign.errors import DataError, suggestion

POLICIES = ("won_once", "never_lost", "drop_mixed")


class UnpairedImages:
    """Serve each distinct (image, caption) of a cache of pairs once, with a label.

    An image may win against one and lose against another. What such a mixed one is, the policy says:

    * "won_once": desirable, as in Diffusion-KTO (`gt_label_wi_l` of the official script)
    * "never_lost": undesirable (`gt_label_w_il`)
    * "drop_mixed": left out (`gt_label_w_l`)

    Example ids are those the same images have in a data set of single images. Batches have k = 1 and scores [B,1] of
    1 (desirable) or 0.

    Args:
        cache: pairs.
        policy: see above.
        swapped: bool [P], pairs whose winner is to count as the loser (`AnnotatedPairs.swapped`).

    Raises:
        DataError: an unknown policy, a cache of anything but pairs, or no image left.
    """

    images_per_example = 1
    has_preference = False

    def __init__(self, cache: LatentCache, policy: str = "won_once", *, swapped: np.ndarray | None = None):
        if policy not in POLICIES:
            raise DataError(
                f'Unknown policy "{policy}".{suggestion(policy, POLICIES)} Available: {", ".join(POLICIES)}.'
            )
        if cache.images_per_example != 2:
            raise DataError(f"Only pairs can be taken apart; {cache.folder} has {cache.images_per_example} an example.")
        self.cache, self.policy = cache, policy
        self._places, self.desirable = _distinct(cache, policy, swapped)
        if not len(self._places):
            raise DataError(
                f'Every image of {cache.folder} both won and lost: "drop_mixed" leaves none. Use "won_once".'
            )
        self._images, self._prompts = (x.reshape(-1)[self._places] for x in (cache.image_rows, cache.prompt_rows))
        digests = np.load(cache.folder / "image_digests.npy")
        rows = zip(self._images, self._prompts, strict=True)
        ids = [stable_id(cache.prompts[prompt], digests[image].tobytes()) for image, prompt in rows]
        self.example_ids = np.array(ids, dtype=np.int64)  # [P]

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def scores(self) -> np.ndarray:
        """Return 1 (desirable) or 0 [P,1] float32."""
        return self.desirable[:, None].astype(np.float32)

    def batch(self, indices: Sequence[int], augment: Augment) -> PreferenceBatch:
        """Gather B images with their labels, augmented as `augment` says for their example ids."""
        index = np.asarray(indices, dtype=np.int64)
        return self.cache.gather(
            self.example_ids[index],
            self._images[index, None],
            self._prompts[index, None],
            augment,
            scores=self.desirable[index, None],
        )


def _distinct(cache: LatentCache, policy: str, swapped: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return where each (image, caption) first stands among the 2P places of the pairs, and whether it is desirable."""
    numbered = cache.image_rows * len(cache.prompts) + cache.prompt_rows  # [P,2], one number for each (image, caption)
    distinct, first, of = np.unique(numbered, return_index=True, return_inverse=True)
    loses = np.tile([False, True], (len(numbered), 1))
    if swapped is not None:
        loses ^= np.asarray(swapped, dtype=bool)[:, None]
    of, loses = of.reshape(-1), loses.reshape(-1)
    won, lost = (np.bincount(of[which], minlength=len(distinct)) > 0 for which in (~loses, loses))
    kept = np.argsort(first)  # in the order of the pairs
    if policy == "drop_mixed":
        kept = kept[(won ^ lost)[kept]]
    return first[kept], (won if policy == "won_once" else ~lost)[kept]
