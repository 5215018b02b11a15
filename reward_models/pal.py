"""PAL (Chen et al. 2024, arXiv:2406.08469): people differ, so a user is a mixture of a few ideal points.

The heads are small and stand on a frozen CLIP; nobody has published any for text-to-image, so they are trained here.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.base import UNPUBLISHED, Scorer, ScorerCard, ScorerError
from reward_models.checkpoints import from_hub, is_hub_id, load_strict, read_state_dict, save_safetensors
from reward_models.hf_clip import CONFIG_FILES, HFClipScorer, read_json, write_json
from reward_models.losses import pair_losses

CONFIG_FILE, WEIGHT_FILE = "pal.json", "pal.safetensors"
IDEAL_POINTS = ("Pw", "f(Pw)", "f(P)w", "|f(P)|w", "g(prompt)w")
PREFERENCES = ("angle", "dist", "dist_squared")
MAX_SCALE = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PalConfig:
    """Describe the heads; the defaults are PAL-B's with prompt-conditioned ideal points."""

    users: tuple[str, ...]
    groups: int = 2  # K, ideal points that users are mixtures of
    width: int = 512  # of the space in which pictures and ideal points meet
    hidden_layers: int = 2  # of each projector, with GELU
    ideal_point: str = "g(prompt)w"  # one of IDEAL_POINTS; all but the last do not read the prompt (PAL-A)
    preference: str = "angle"  # one of PREFERENCES
    temperature: float = 1.0  # of the softmax that turns a user's logits into weights

    def __post_init__(self):
        """Raise ScorerError for values outside their range."""
        if self.ideal_point not in IDEAL_POINTS or self.preference not in PREFERENCES:
            raise ScorerError(
                f"ideal_point must be one of {', '.join(IDEAL_POINTS)} and preference one of {', '.join(PREFERENCES)}, "
                f'got "{self.ideal_point}" and "{self.preference}".'
            )
        if not self.users or len(set(self.users)) < len(self.users):
            raise ScorerError(f"PAL needs at least one user, each named once, got {list(self.users)}.")
        if min(self.groups, self.width, self.temperature) <= 0 or self.hidden_layers < 0:
            raise ScorerError("groups, width and temperature must be positive, hidden_layers at least 0.")


class PalHeads(nn.Module):
    """Turn CLIP embeddings [N, D] and users into rewards.

    w_u = softmax(W_u / T); ideal point "Pw": w P, "f(Pw)": f(w P), "f(P)w": w f(P), "|f(P)|w": w of unit f(P),
    "g(prompt)w": sum_k w_k g_k(prompt). Reward "angle": min(exp(logit_scale), 100) cos(f(x), u); "dist": -|f(x) - u|;
    "dist_squared": -|f(x) - u|^2. Source: RamyaLab/pluralistic-alignment @fcfc03c0, src/pal_rm_{a,b}.
    """

    def __init__(self, config: PalConfig, dim: int):
        super().__init__()
        self.config = config
        self.item = projector(dim, config.width, config.hidden_layers)
        self.user_logits = nn.Parameter(torch.zeros(len(config.users), config.groups))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if config.ideal_point == "g(prompt)w":
            heads = (projector(dim, config.width, config.hidden_layers) for _ in range(config.groups))
            self.group_heads = nn.ModuleList(heads)
        else:
            self.prototypes = nn.Parameter(
                torch.randn(config.groups, config.width if config.ideal_point == "Pw" else dim)
            )

    def weights(self, users: Sequence[str | None]) -> Tensor:
        """Return the mixture [N, K] of each user; None stands for the average user."""
        known = {name: index for index, name in enumerate(self.config.users)}
        if unknown := [user for user in users if user is not None and user not in known]:
            raise ScorerError(f'PAL does not know the user "{unknown[0]}". Add it with add_user, or use None.')
        mixtures = torch.softmax(self.user_logits.float() / self.config.temperature, dim=-1)
        average = mixtures.mean(dim=0)
        return torch.stack([average if user is None else mixtures[known[user]] for user in users])

    def ideal_points(self, weights: Tensor, text: Tensor | None = None) -> Tensor:
        """Return the ideal points [N, width] of mixtures [N, K]; text [N, D] are prompt embeddings where read."""
        kind = self.config.ideal_point
        if kind == "g(prompt)w":
            points = torch.stack([head(text) for head in self.group_heads], dim=1)
            return torch.einsum("nk,nkd->nd", weights, points)
        if kind == "Pw":
            return weights @ self.prototypes
        if kind == "f(Pw)":
            return self.item(weights @ self.prototypes)
        points = self.item(self.prototypes)
        return weights @ (F.normalize(points, dim=-1) if kind == "|f(P)|w" else points)

    def rewards(self, items: Tensor, ideals: Tensor) -> Tensor:
        """Return the rewards [N] of projected pictures [N, width] for ideal points [N, width]; higher is better."""
        if self.config.preference == "angle":
            return self.logit_scale.exp().clamp(max=MAX_SCALE) * F.cosine_similarity(items, ideals, dim=-1)
        distance = torch.linalg.vector_norm(items - ideals, dim=-1)
        return -distance if self.config.preference == "dist" else -distance.square()

    def losses(self, image_0: Tensor, image_1: Tensor, ideals: Tensor, label_0: Tensor) -> Tensor:
        """Return the cross-entropy [N] of labels P(image_0 preferred) [N] with sigmoid(reward_0 - reward_1).

        image_0, image_1: CLIP embeddings [N, D]; ideals: [N, width] of who chose.
        """
        return pair_losses(self.rewards(self.item(image_0), ideals), self.rewards(self.item(image_1), ideals), label_0)


class Pal(HFClipScorer):
    """Score for one user (`for_user`), or for the average of all known users."""

    is_scaled = True
    activation = None
    user: str | None = None
    cards = (
        ScorerCard(
            name="pal",
            weights=UNPUBLISHED,
            preprocessing="clip_pil: PIL bicubic, short side 224, centre crop",
            text_length=77,
            formula="reward(f(e_image), sum_k softmax(W_user)_k g_k(e_text)); P(a > b) = sigmoid(a - b)",
            scale="angle: up to 100 x cosine; dist: minus a distance",
            usual_range=(-100.0, 100.0),
            licence="Apache-2.0 (formulas); the heads are yours",
            traps=(
                "A score belongs to one user; without one it is that of the average, whom nobody need resemble.",
                "The published dist is a difference of distances whose sign is in the label; here higher is better.",
                "The published dist_normalization divides over the token axis in the token models, a bug left out.",
                "A new user needs pairs of his own: add_user, then train user_logits with everything else frozen.",
            ),
            source="RamyaLab/pluralistic-alignment @fcfc03c0",
        ),
    )

    @classmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a folder or hub id with pal.json and pal.safetensors; the CLIP is in it, or named there by "clip"."""
        patterns = (*CONFIG_FILES, "*.safetensors")
        folder = from_hub(path_or_id, patterns=patterns) if is_hub_id(path_or_id) else Path(path_or_id)
        content = dict(read_json(folder / CONFIG_FILE))
        clip = content.pop("clip", None) or str(folder)
        try:
            config = PalConfig(**{**content, "users": tuple(content["users"])})
        except (TypeError, KeyError) as error:
            raise ScorerError(f"{folder / CONFIG_FILE} does not describe PAL heads ({error!r}).") from None
        scorer = cls.from_clip(clip, config, card=card, dtype=dtype)
        weights = folder / WEIGHT_FILE
        load_strict(scorer.heads, read_state_dict(weights), weights)
        scorer.source = path_or_id
        return scorer

    @classmethod
    def from_clip(
        cls,
        path_or_id: str,
        config: PalConfig,
        *,
        card: ScorerCard | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Self:
        """Put fresh heads on a CLIP, to be trained; the CLIP stays frozen."""
        scorer = super().from_pretrained(card or cls.cards[0], str(path_or_id), dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = PalHeads(config, scorer.module.config.projection_dim)
        scorer.module = nn.ModuleDict({"clip": scorer.module, "heads": heads}).eval().requires_grad_(False)
        return scorer

    @property
    def clip(self) -> nn.Module:
        """Return the frozen CLIPModel."""
        return self.module["clip"] if isinstance(self.module, nn.ModuleDict) else self.module

    @property
    def heads(self) -> PalHeads:
        """Return the heads, float32."""
        return self.module["heads"]

    @property
    def logit_scale(self) -> Tensor:
        """Return the scale of the angle, float32 []."""
        return self.heads.logit_scale.exp().clamp(max=MAX_SCALE)

    @property
    def preference_scale(self) -> float:
        """Return 1: a reward is a logit."""
        return 1.0

    def for_user(self, user: str | None) -> Self:
        """Set whose preferences are scored and return the scorer; None is the average user."""
        self.heads.weights([user])
        self.user = user
        return self

    @torch.no_grad()
    def add_user(self, user: str) -> nn.Parameter:
        """Add a user who starts between all groups, and return `user_logits` [users, groups] to be trained."""
        heads = self.heads
        heads.config = dataclasses.replace(heads.config, users=(*heads.config.users, user))
        heads.user_logits = nn.Parameter(
            torch.cat([heads.user_logits, heads.user_logits.new_zeros(1, heads.config.groups)])
        )
        return heads.user_logits

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return the projected pictures [N, width] float32."""
        return self.heads.item(self.image_embeddings(pixels))

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the rewards [N] float32 for `user`."""
        weights = self.heads.weights([self.user]).expand(len(features), -1)
        return self.heads.rewards(features, self.heads.ideal_points(weights, self.cached_text_embeddings(prompts)))

    score_matrix = Scorer.score_matrix  # the heads take the prompt as it is, not a product with it

    def _write(self, folder: Path) -> None:
        heads, self.module = self.module, self.module["clip"]
        try:
            super()._write(folder)
        finally:
            self.module = heads
        save_safetensors(self.heads.state_dict(), folder / WEIGHT_FILE)
        write_json(folder / CONFIG_FILE, dataclasses.asdict(self.heads.config))


def projector(dim: int, width: int, hidden_layers: int) -> nn.Sequential:
    """Return Linear(dim, width), then GELU and Linear(width, width) once for each hidden layer."""
    layers: list[Any] = [nn.Linear(dim, width)]
    for _ in range(hidden_layers):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)
