"""CLIPScore in the three conventions papers use without saying which: choose one by its name."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from reward_models.base import ScorerCard
from reward_models.hf_clip import OPENAI_VIT_B_32, OPENAI_VIT_L_14, HFClipScorer

HESSEL_PREFIX = "A photo depicts "

_RAW = ScorerCard(
    name="clip_score_raw",
    weights="openai/clip-vit-large-patch14",
    preprocessing="clip_pil: PIL bicubic, short side 224, centre crop",
    text_length=77,
    formula="<e_image, e_text>; P(a > b) = sigmoid(exp(logit_scale) * (a - b))",
    scale="cosine in [-1, 1]",
    usual_range=(0.18, 0.33),
    licence="MIT",
    traps=(
        "Three conventions share one name; say which, and which CLIP: ViT-L/14 gives 0.18 to 0.33, ViT-H/14 more.",
        "T2I-CompBench uses ViT-B/32; Diffusion-DPO uses ViT-H/14 with HPSv2's letterbox instead of the crop.",
        "Scores of different prompts are not comparable.",
        "OpenAI's models use QuickGELU, LAION's the exact GELU: the config beside the weights decides.",
    ),
    source="THUDM/ImageReward @c1392c6d, openai/CLIP @d05afc43",
)


class ClipScoreRaw(HFClipScorer):
    """Score by the plain cosine, as ImageReward's repository does."""

    is_scaled = False
    official_config = OPENAI_VIT_L_14
    activation = None
    cards = (_RAW,)

    def summary(self, scores: Tensor) -> Tensor:
        """Return the one number [] that a table gives for scores [N]: their mean."""
        return scores.mean()


class ClipScoreTorchmetrics(ClipScoreRaw):
    """Score by 100 * cosine; torchmetrics clamps the mean at 0, which is `summary`."""

    cards = (
        dataclasses.replace(
            _RAW,
            name="clip_score_torchmetrics",
            formula="100 * <e_image, e_text>; a set of images gets max(mean, 0)",
            scale="100 x cosine",
            usual_range=(18.0, 33.0),
            traps=(
                *_RAW.traps,
                "torchmetrics cuts long prompts after tokenising, loses the end token and reports 17 instead of 26; "
                "here the end token is kept.",
                "The clamp is applied after the mean (summary), not to each image.",
            ),
            source="Lightning-AI/torchmetrics @dab03339",
        ),
    )

    @property
    def preference_scale(self) -> float:
        """Return what turns a difference of scores into CLIP's own logit."""
        return float(self.logit_scale) / 100

    def from_cosine(self, cosine: Tensor) -> Tensor:
        """Return 100 * cosine, unclamped."""
        return 100 * cosine

    def summary(self, scores: Tensor) -> Tensor:
        """Return torchmetrics' number [] of scores [N]: max(mean, 0)."""
        return scores.mean().clamp(min=0)


class ClipScoreHessel(ClipScoreRaw):
    """Score by 2.5 * max(cosine, 0) of the prompt with a prefix (Hessel et al. 2021, arXiv:2104.08718)."""

    official_config = OPENAI_VIT_B_32
    cards = (
        dataclasses.replace(
            _RAW,
            name="clip_score_hessel",
            weights="openai/clip-vit-base-patch32",
            formula=f'2.5 * max(<e_image, e_text>, 0), the prompt after "{HESSEL_PREFIX}"',
            scale="2.5 x cosine, 0 where it is negative",
            usual_range=(0.5, 0.9),
            traps=(*_RAW.traps, "Below a cosine of 0 all scores are 0 and carry no gradient."),
            source="jmhessel/clipscore, as in chaofengc/IQA-PyTorch @01ae427f",
        ),
    )

    @property
    def preference_scale(self) -> float:
        """Return what turns a difference of scores into CLIP's own logit, where no cosine is negative."""
        return float(self.logit_scale) / 2.5

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return token ids [N, text_length] of the prompts after the prefix."""
        return super().tokenize([HESSEL_PREFIX + prompt for prompt in prompts])

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has with the prefix before it is cut."""
        return super().token_counts([HESSEL_PREFIX + prompt for prompt in prompts])

    def from_cosine(self, cosine: Tensor) -> Tensor:
        """Return 2.5 * max(cosine, 0)."""
        return 2.5 * torch.clamp(cosine, min=0)
