"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): a CLIP ViT-H fine-tuned on Pick-a-Pic choices."""

from reward_models.base import ScorerCard
from reward_models.hf_clip import HFClipScorer


class PickScore(HFClipScorer):
    """Score by exp(logit_scale) * cosine of a Hugging Face CLIPModel."""

    is_scaled = True
    cards = (
        ScorerCard(
            name="pickscore",
            weights="yuvalkirstain/PickScore_v1",
            preprocessing="clip_pil: PIL bicubic, short side 224, centre crop",
            text_length=77,
            formula="exp(logit_scale) * <e_image, e_text>; P(a > b) = sigmoid(a - b)",
            scale="about 100 x cosine",
            usual_range=(17.0, 24.0),
            licence="MIT",
            traps=(
                "Scores of different prompts are not comparable: each prompt has its own offset.",
                "The wrappers in the DiffusionDPO, SmPO and SePPO repositories return the cosine, 100 times smaller.",
                "flow_grpo divides by 26.",
                "score_tensor resizes with an antialiased tensor filter; the network was trained on PIL's.",
            ),
            source="yuvalkirstain/PickScore @f79607ff",
        ),
    )
