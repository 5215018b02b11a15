"""MPS (Zhang et al. 2024, arXiv:2405.14705): image tokens read the words that matter for one kind of preference."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.base import Scorer, ScorerCard, ScorerError
from reward_models.checkpoints import read_state_dict
from reward_models.hf_clip import (
    HFClipScorer,
    build,
    load_spec,
    load_tokenizer,
    locate,
    read_config,
    read_json,
    write_json,
)
from reward_models.preprocess import PixelSpec

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
OFFICIAL_CROSS = {"layers": 4, "heads": 16, "dim_head": 64, "ff_mult": 4}
MASK_REFERENCES = ("sample", "batch")
CACHED_PROMPTS = 128  # a prompt keeps all its tokens: 300 KiB at the official size


class MPS(HFClipScorer):
    """Score by exp(logit_scale) * cosine of what the image tokens read in the prompt with the prompt itself.

    `threshold` and `mask_reference` can be set: "sample" divides similarities by the maximum of the same prompt, as
    the official scripts do at their batch size of 1; "batch" divides by the maximum of the whole batch, as published.
    """

    is_scaled = True
    threshold: float = 0.3
    mask_reference: str = "sample"
    cards: ClassVar[tuple[ScorerCard, ...]] = (
        ScorerCard(
            name="mps",
            weights="RE-N-Y/mpsv1",
            preprocessing="clip_pil: PIL bicubic, short side 224, centre crop",
            text_length=77,
            formula="exp(logit_scale) * <e, e_text>, e the first image token after 4 layers of masked cross-attention",
            scale="about 100 x cosine",
            usual_range=(8.0, 12.0),
            licence="MIT",
            traps=(
                "As published the mask depends on the other prompts of the batch, and masks a prompt altogether where "
                "they are much more similar to the condition: its score is NaN. Here each prompt has its own mask.",
                "The threshold is 0.01 in the training code and 0.3 in the evaluation scripts; here 0.3.",
                "Padding tokens take part in the mask and are attended to, so the tokenizer's padding token matters.",
                "The official checkpoint is a pickled module, which is refused; the hub has a safetensors port.",
                "Scores of different prompts are not comparable.",
            ),
            source="Kwai-Kolors/MPS @be9027f3",
        ),
    )

    def __init__(self, card: ScorerCard, module: nn.Module, spec: PixelSpec, tokenizer: Any, *, source: str):
        super().__init__(card, module, spec, tokenizer, source=source)
        self.condition = CONDITION
        self._token_cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @classmethod
    def from_pretrained(cls, card: ScorerCard, path_or_id: str, *, dtype: torch.dtype = torch.float32) -> Self:
        """Load a folder, hub id or file of safetensors with the names of the official module or of its port."""
        folder, weights = locate(path_or_id)
        if folder is not None and "vision_config" not in _config_file(folder):
            folder = None  # the port's config.json says nothing about sizes
        config = read_config(folder, cls.official_config, activation=cls.activation)
        cross = getattr(config, "cross_model", OFFICIAL_CROSS)
        state = own_names(read_state_dict(weights), weights)
        module = build(lambda: MPSNetwork(config, cross), state, weights, dtype)
        tokenizer = load_tokenizer(folder, config, path_or_id)
        spec = load_spec(folder, config.vision_config.image_size)
        return cls(card, module, spec, tokenizer, source=path_or_id)

    @property
    def clip(self) -> nn.Module:
        """Return the CLIPModel."""
        return self.module.model

    @property
    def logit_scale(self) -> Tensor:
        """Return exp(logit_scale), float32 []."""
        return self.clip.logit_scale.float().exp().reshape(())

    def clear_cache(self) -> None:
        """Forget the prompts; needed after changing the weights or the condition."""
        super().clear_cache()
        self._token_cache.clear()

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Refuse: an image has no embedding of its own here, only one for each prompt."""
        raise ScorerError("MPS embeds an image only together with a prompt: use score_pixels.")

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return the projected image tokens [N, 1 + patches, D], without the last norm, as the official code."""
        tokens = self.clip.vision_model(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        return self.clip.visual_projection(tokens)

    @torch.no_grad()
    def text_tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return all projected tokens [N, L, D] of the prompts, and their embeddings [N, D]; both are cached."""
        known = {prompt: self._token_cache[prompt] for prompt in prompts if prompt in self._token_cache}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if missing:
            self._report_cut([prompt for prompt in missing if prompt != self.condition])
            output = self.clip.text_model(input_ids=self.tokenize(missing).to(self.device))
            tokens = self.clip.text_projection(output.last_hidden_state)
            pooled = self.clip.text_projection(output.pooler_output)
            known.update(zip(missing, zip(tokens, pooled, strict=True), strict=True))
        self._token_cache.update(known)
        for prompt in known:
            self._token_cache.move_to_end(prompt)
        while len(self._token_cache) > CACHED_PROMPTS:
            self._token_cache.popitem(last=False)
        return tuple(torch.stack(parts) for parts in zip(*(known[prompt] for prompt in prompts), strict=True))

    def score_features(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scores [N] float32 of image tokens [N, I, D], with gradients to them."""
        tokens, embedding = self.text_tokens(prompts)
        condition = self.text_tokens([self.condition])[0]
        mask = attention_mask(
            similarity(tokens, condition.expand(len(tokens), -1, -1)), self.threshold, self.mask_reference
        )
        image = self.module.cross_model(features, tokens, mask)[:, 0]
        return self.from_cosine(F.cosine_similarity(image.float(), embedding.float(), dim=-1))

    score_matrix = Scorer.score_matrix  # an image has no embedding of its own here

    @property
    def _nan_hint(self) -> str:
        if self.mask_reference == "batch":
            return 'The mask closed on all its words, as published; mask_reference = "sample" gives each its own.'
        return super()._nan_hint

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        config = {**read_json(folder / "config.json"), "cross_model": self.module.sizes}
        write_json(folder / "config.json", config)


class MPSNetwork(nn.Module):
    """Hold the CLIP and the cross model under the names of the official module."""

    def __init__(self, config: Any, cross: Mapping[str, int]):
        from transformers import CLIPModel

        super().__init__()
        self.sizes = dict(cross)
        self.model = CLIPModel(config)
        self.cross_model = CrossModel(config.projection_dim, **cross)


class CrossModel(nn.Module):
    """Let query tokens [N, I, D] read context tokens [N, T, D]: cross-attention, then self-attention, in each layer."""

    def __init__(self, dim: int, *, layers: int, heads: int, dim_head: int, ff_mult: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    _Named(CrossAttention(dim, heads, dim_head, ff_mult)),
                    _Named(SelfAttention(dim, heads, dim_head, ff_mult)),
                ]
            )
            for _ in range(layers)
        )

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return the query tokens after all layers; mask [N, 1, T] is added to the attention scores."""
        for read, think in self.layers:
            queries = queries + read.fn(queries, context, mask)
            queries = queries + think.fn(queries)
        return queries


class _Named(nn.Module):
    """Give a block the official name, "fn" inside its residual connection."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn


class CrossAttention(nn.Module):
    """Attend to the context with one shared key and value head, beside a gated MLP of the same input (as PaLM)."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim, bias=False)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        gated = [nn.Linear(dim, 2 * ff_mult * dim, bias=False), SwiGLU(), nn.Linear(ff_mult * dim, dim, bias=False)]
        self.ff = nn.Sequential(*gated)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return what is added to x [N, I, D]."""
        x = self.norm(x)
        query = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        return self.to_out(multi_query_attention(query, key, value, mask)) + self.ff(x)


class SelfAttention(nn.Module):
    """Attend to the tokens themselves with rotary positions, beside a gated MLP from the same fused projection."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_mult: int):
        super().__init__()
        self.heads = heads
        self.widths = (heads * dim_head, dim_head, dim_head, 2 * ff_mult * dim)
        self.norm = nn.LayerNorm(dim, bias=False)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(ff_mult * dim, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to x [N, I, D]."""
        query, key, value, gated = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        query = rotate(query.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        return self.attn_out(multi_query_attention(query, rotate(key), value)) + self.ff_out(gated)


class SwiGLU(nn.Module):
    """Halve [..., 2D] into value and gate: silu(gate) * value."""

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D]."""
        value, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def multi_query_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return [N, I, H * D] for queries [N, H, I, D], one key and value head [N, T, D] and a mask [N, 1, T] to add."""
    scores = torch.einsum("nhid,ntd->nhit", query * query.shape[-1] ** -0.5, key)
    if mask is not None:
        scores = scores + mask.unsqueeze(1).to(scores.dtype)
    return torch.einsum("nhit,ntd->nihd", scores.softmax(dim=-1), value).flatten(2)


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions (arXiv:2104.09864) to [..., T, D]: angle t / 10000^(2i / D), halves paired."""
    length, dim = x.shape[-2:]
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat([-second, first], dim=-1) * angles.sin().to(x.dtype)


def similarity(tokens: Tensor, condition: Tensor) -> Tensor:
    """Return for each token [N, T, D] its largest product with a token of the condition [N, C, D]: [N, T]."""
    return torch.einsum("ntd,ncd->nct", tokens, condition).amax(dim=1)


def attention_mask(similarities: Tensor, threshold: float, reference: str = "sample") -> Tensor:
    """Return 0 for words above `threshold` times the largest similarity [N, T], else -inf: [N, 1, T].

    reference: "sample" takes the largest of each prompt, "batch" of all prompts (the published code).
    """
    if reference not in MASK_REFERENCES:
        raise ScorerError(f'mask_reference must be one of {", ".join(MASK_REFERENCES)}, got "{reference}".')
    largest = similarities.amax(dim=-1, keepdim=True) if reference == "sample" else similarities.max()
    is_open = similarities / largest > threshold
    return torch.zeros_like(similarities).masked_fill(~is_open, float("-inf")).unsqueeze(1)


def own_names(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Return the weights under the names of `MPSNetwork`: without the port's prefix and the constant buffers."""
    if all(key.startswith("mps.") for key in state):
        state = {key.removeprefix("mps."): value for key, value in state.items()}
    for key, value in state.items():
        if key.endswith(".norm.bias") and value.any():
            raise ScorerError(f"{source}: {key} is not zero, but MPS' norms have no bias. It is another network.")
    return {key: value for key, value in state.items() if not key.endswith((".norm.bias", ".inv_freq"))}


def _config_file(folder: Path) -> Mapping[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
