"""Joint attention in which the last token of the text stands for many equal ones: SD3's zeros in T5's place.

Without T5 the pipeline appends 256 zero vectors to the text. They have no positions, so all of them stay equal through
every block, and nobody's answer depends on how many queries they ask. One of them is enough everywhere but in the
softmax, where its key and value have to appear as often as the pipeline has them. Outputs and gradients are those of
the long text; at 512 x 512 pixels a fifth of all tokens is not computed.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

REPEATS = "last_token_repeats"  # of `joint_attention_kwargs`: how many equal tokens the last one of the text is


class RepeatedTextAttention(JointAttnProcessor2_0):
    """Attend as diffusers does; where the call names REPEATS, the last token of the text counts that often."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        last_token_repeats: int = 1,
        **kwargs: Any,
    ) -> Any:
        """Return [N,S,C] for tokens [N,S,C], and [N,L,C] (of all layers but the last) for text [N,L,C] if given."""
        if encoder_hidden_states is None or last_token_repeats == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        image = self._projected(attn, (attn.to_q, attn.to_k, attn.to_v), hidden_states, attn.norm_q, attn.norm_k)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = self._projected(attn, added, encoder_hidden_states, attn.norm_added_q, attn.norm_added_k)
        query, key, value = (torch.cat(parts, dim=2) for parts in zip(image, text, strict=True))
        key, value = (self._repeated(part, last_token_repeats) for part in (key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        picture, words = attended.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        picture = attn.to_out[1](attn.to_out[0](picture))
        return picture, words if attn.context_pre_only else attn.to_add_out(words)

    @staticmethod
    def _projected(
        attn: Attention,
        layers: tuple[nn.Module, ...],
        tokens: Tensor,
        *norms: nn.Module | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value [N,heads,L,d] of tokens [N,L,C], normalised where the model does so."""
        query, key, value = (layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in layers)
        query, key = (part if norm is None else norm(part) for part, norm in zip((query, key), norms, strict=True))
        return query, key, value

    @staticmethod
    def _repeated(tokens: Tensor, repeats: int) -> Tensor:
        """Return tokens [N,heads,L,d] whose last one appears `repeats` times."""
        last = tokens[:, :, -1:].expand(-1, -1, repeats - 1, -1)
        return torch.cat([tokens, last], dim=2)


def allow_repeats(denoiser: nn.Module) -> None:
    """Let every joint attention of `denoiser` understand REPEATS, unless some of them run as foreign processors."""
    layers = _layers(denoiser)
    if all(type(layer.processor) in (JointAttnProcessor2_0, RepeatedTextAttention) for layer in layers):
        processor = RepeatedTextAttention()
        for layer in layers:
            layer.set_processor(processor)


def repeats_text(denoiser: nn.Module) -> bool:
    """Tell whether a network, wrapped or not, understands REPEATS: its first attention tells, as all do or none."""
    first = next((part for part in denoiser.modules() if isinstance(part, Attention)), None)
    return first is not None and isinstance(first.processor, RepeatedTextAttention)


def _layers(denoiser: nn.Module) -> list[Attention]:
    return [part for part in denoiser.modules() if isinstance(part, Attention)]
