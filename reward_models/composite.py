"""A weighted sum of several scorers, with the scales made comparable: a JSON file names the parts.

{"normalise": "affine", "scorers": [{"name": "pickscore", "weight": 1.0, "centre": 20.5, "scale": 1.2},
                                    {"name": "aesthetic", "weight": 0.5, "path": "folder beside this file"}]}
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor, nn

from reward_models.base import UNPUBLISHED, ImageLike, Prompts, Scorer, ScorerCard, ScorerError, listed
from reward_models.checkpoints import write_folder
from reward_models.hf_clip import read_json, write_json
from reward_models.recipes import JoinedRecipe, weights_digest

RECIPE_FILE = "composite.json"
NORMALISATIONS = ("affine", "centre", "zscore", "rank")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Say what one scorer contributes: weight * (score - centre) / scale."""

    name: str
    path: str | None = None  # of the weights; relative to the recipe where that exists. None: the published ones
    weight: float = 1.0
    centre: float = 0.0
    scale: float = 1.0


class Composite(Scorer):
    """Score by sum_i weight_i * n(score_i).

    n is "affine": (s - centre) / scale with fixed numbers, which `fit` measures; or, among the images of one prompt,
    "centre": s - mean, "zscore": (s - mean) / standard deviation, "rank": from 0 (worst) to 1 (best). The last three
    compare images, so they exist for `score_groups` and `score_matrix` only.
    """

    cards = (
        ScorerCard(
            name="composite",
            weights=UNPUBLISHED,
            preprocessing="that of each part",
            text_length=77,
            formula="sum_i weight_i * n(score_i), n one of affine, centre, zscore, rank",
            scale="that of the recipe",
            usual_range=(-3.0, 3.0),
            licence="that of each part",
            traps=(
                "Without centre and scale the part with the largest numbers decides: PickScore spans 7, HPSv2 0.05.",
                "centre, zscore and rank depend on the images compared: use score_groups, not score.",
                "A part that does not read the prompt (aesthetic) can outvote those that do.",
            ),
            source="this package",
        ),
    )

    def __init__(
        self, card: ScorerCard, scorers: Sequence[Scorer], parts: Sequence[Part], normalise: str, *, source: str
    ):
        super().__init__(card, nn.ModuleList(scorer.module for scorer in scorers), source=source)
        self.scorers, self.parts, self.normalise = list(scorers), list(parts), normalise
        dummy = Image.new("RGB", (8, 8))
        self._shapes = [scorer.preprocess(dummy).shape for scorer in scorers]

    @classmethod
    def from_pretrained(
        cls,
        card: ScorerCard,
        path_or_id: str,
        *,
        dtype: torch.dtype = torch.float32,
        load: Callable[..., Scorer] | None = None,
    ) -> Self:
        """Load a recipe file, or a folder with composite.json, and every scorer it names; `load` finds those."""
        from reward_models import registry

        load, file = load or registry.load, recipe_file(path_or_id)
        normalise, parts = read_recipe(file)
        scorers = [load(part.name, resolved(part.path, file), dtype=dtype) for part in parts]
        return cls(card, scorers, parts, normalise, source=path_or_id)

    @property
    def text_length(self) -> int | None:
        """Return the shortest text length of the parts that read the prompt."""
        return min((scorer.text_length for scorer in self.scorers if scorer.text_length is not None), default=None)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return the largest number of tokens that any part makes of each prompt; each part reports its own cuts."""
        return [max(counts) for counts in zip(*(scorer.token_counts(prompts) for scorer in self.scorers), strict=True)]

    def to(self, device: str | torch.device) -> Self:
        """Move all parts and return the scorer."""
        for scorer in self.scorers:
            scorer.to(device)
        return self

    @property
    def recipe(self) -> JoinedRecipe:
        """Return how the pixels of all parts are made, behind one another [P] float32: decoded once."""
        return JoinedRecipe(tuple(scorer.recipe for scorer in self.scorers))

    @property
    def identity(self) -> str:
        """Return a hash of the recipe and of what the parts depend on."""
        return weights_digest({}, self.normalise, self.parts, [scorer.identity for scorer in self.scorers])

    def preprocess_tensor(self, images: Tensor) -> Tensor:
        """Return the pixels of all parts behind one another [N, P], differentiably."""
        return torch.cat([scorer.preprocess_tensor(images).flatten(1) for scorer in self.scorers], dim=1)

    def part_scores(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return what each part gives, before weights: [parts, N] float32 for pixels [N, P]."""
        pieces = pixels.split([shape.numel() for shape in self._shapes], dim=1)
        return torch.stack(
            [
                scorer.score_pixels(piece.unflatten(1, shape), prompts)
                for scorer, piece, shape in zip(self.scorers, pieces, self._shapes, strict=True)
            ]
        )

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [N] float32 of pixels [N, P]; only with fixed centres and scales."""
        if self.normalise != "affine":
            raise ScorerError(
                f'The composite normalises by "{self.normalise}", which compares the images of one prompt: '
                'use score_groups or score_matrix, or "affine" with centre and scale (see fit).'
            )
        return self._combined(self.part_scores(features, prompts))

    @torch.no_grad()
    def raw_scores(self, images: ImageLike | Iterable[ImageLike], prompts: Prompts = None) -> Tensor:
        """Return what each part gives on its own scale [parts, N] float32, on the CPU."""
        images = listed(images)
        prompts = self._prompts_for(len(images), prompts)
        scores = self._batched(
            len(images), lambda part: self.part_scores(self.pixels(images[part]), prompts[part]).T.float().cpu()
        )
        return self._checked(scores).reshape(len(images), len(self.parts)).T

    def fit(self, images: Iterable[ImageLike], prompts: Prompts = None) -> Self:
        """Set centre and scale of each part to mean and standard deviation over these images; return the scorer."""
        raw = self.raw_scores(images, prompts)
        if raw.shape[1] < 2 or not (raw.std(dim=1) > 0).all():
            raise ScorerError(
                f"Cannot measure the spread of every part on {raw.shape[1]} image(s). Give more, different ones."
            )
        self.parts = [
            replace(part, centre=row.mean().item(), scale=row.std().item())
            for part, row in zip(self.parts, raw, strict=True)
        ]
        return self

    def score_groups(self, groups: Iterable[tuple[str, Iterable[ImageLike]]]) -> list[Tensor]:
        """Return the scores [n] float32 of each (prompt, its n images), normalised within the group where asked for."""
        groups = [(prompt, listed(images)) for prompt, images in groups]
        every = [image for _, images in groups for image in images]
        raw = self.raw_scores(every, [prompt for prompt, images in groups for _ in images])
        sizes = [len(images) for _, images in groups]
        return [self._combined(group) for group in raw.split(sizes, dim=1)] if sizes else []

    def score_matrix(self, images: Iterable[ImageLike], prompts: Sequence[str]) -> Tensor:
        """Return the scores [M, N] float32 of M images for each of N prompts, normalised in each column."""
        images, prompts = listed(images), [prompts] if isinstance(prompts, str) else list(prompts)
        raw = torch.stack([scorer.score_matrix(images, prompts) for scorer in self.scorers])
        return self._combined(raw.transpose(1, 2)).T

    def save(self, directory: str | Path) -> Path:
        """Write the recipe; the parts' weights stay where they are."""
        recipe = {"normalise": self.normalise, "scorers": [self._absolute(part) for part in self.parts]}
        return write_folder(directory, lambda folder: write_json(folder / RECIPE_FILE, recipe))

    def _absolute(self, part: Part) -> Mapping[str, object]:
        source = self.scorers[self.parts.index(part)].source
        place = str(Path(source).resolve()) if part.path is not None and Path(source).exists() else part.path
        return asdict(replace(part, path=place))

    def _combined(self, raw: Tensor) -> Tensor:
        """Return the weighted sum [..., n] of part scores [parts, ..., n], normalised along the last dimension."""
        rows = [
            part.weight * normalised(scores, self.normalise, part.centre, part.scale)
            for part, scores in zip(self.parts, raw, strict=True)
        ]
        return torch.stack(rows).sum(dim=0)


def normalised(scores: Tensor, how: str, centre: float = 0.0, scale: float = 1.0) -> Tensor:
    """Return scores [..., n] on a common scale; equal scores share their rank, and a single image has 0 or rank 0.5.

    "zscore" divides by the standard deviation of the n images (not n - 1); without any spread all are 0.
    """
    if how == "affine":
        return (scores - centre) / scale
    if how == "rank":
        others = max(1, scores.shape[-1] - 1)
        below = (scores[..., :, None] > scores[..., None, :]).sum(-1)
        equal = (scores[..., :, None] == scores[..., None, :]).sum(-1) - 1
        ranks = (below + equal / 2) / others
        return ranks if scores.shape[-1] > 1 else torch.full_like(scores, 0.5)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    if how == "centre":
        return centred
    spread = scores.std(dim=-1, keepdim=True, correction=0)
    return torch.where(spread > 0, centred / spread.clamp(min=torch.finfo(scores.dtype).tiny), torch.zeros_like(scores))


def recipe_file(path: str) -> Path:
    """Return the recipe at a path: the file itself, or composite.json in a folder."""
    return Path(path) / RECIPE_FILE if Path(path).is_dir() else Path(path)


def read_recipe(file: Path) -> tuple[str, list[Part]]:
    """Return how the scores are normalised, and the parts.

    Raises:
        ScorerError: there is no recipe, or it is no recipe.
    """
    if not file.is_file():
        raise ScorerError(f"There is no recipe {file}. Give a JSON file such as {__doc__.strip().splitlines()[2]}...")
    content = read_json(file)
    try:
        normalise = content.get("normalise", "affine")
        parts = [Part(**entry) for entry in content["scorers"]]
        unknown = sorted(set(content) - {"normalise", "scorers"})
    except (AttributeError, KeyError, TypeError) as error:
        raise ScorerError(
            f"{file} is no composite recipe ({error}). Expected {{'normalise': ..., 'scorers': [...]}}."
        ) from None
    if unknown or not parts or normalise not in NORMALISATIONS or any(part.scale <= 0 for part in parts):
        raise ScorerError(
            f"{file}: expected at least one scorer, scales above 0, normalise one of {', '.join(NORMALISATIONS)}, no "
            f'other keys; got {len(parts)} scorer(s), "{normalise}"{f" and {unknown}" if unknown else ""}.'
        )
    return normalise, parts


def resolved(path: str | None, recipe: Path) -> str | None:
    """Return where the weights of a part are: beside the recipe if they are there."""
    beside = None if path is None else recipe.parent / path
    return str(beside) if beside is not None and beside.exists() else path
