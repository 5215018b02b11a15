"""CLIP's transformers for scoring on a CPU: the same weights and numbers as the modules they are read from, sooner.

Three things are saved, all exact up to float32's rounding. Linear layers go to oneDNN, which is twice as fast as the
BLAS that `F.linear` calls on CPUs not made by Intel, and applies the GELU on the way. The last block computes the one
token that is read. Prompts are as long as the longest of their batch: attention is causal, so no token sees padding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = tuple[Tensor, Tensor | None]  # [out, in] and [out] of a linear layer


class Block(NamedTuple):
    """Hold the parts of one block: x + attention(norm_1(x)), then x + down(act(up(norm_2(x))))."""

    heads: int
    norm_1: nn.Module
    query: Weights
    key: Weights
    value: Weights
    out: Weights
    norm_2: nn.Module
    up: Weights
    down: Weights
    act: Callable[[Tensor], Tensor] | None = None  # None: the exact GELU


def is_usable(tower: nn.Module, images_or_tokens: Tensor) -> bool:
    """Tell whether `run` may stand in: float32 on a CPU, no gradients, no autocast, no hooks or wrapped layers."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or tower.training:
        return False
    if images_or_tokens.device.type != "cpu" or next(tower.parameters()).dtype != torch.float32:
        return False
    # an adapter keeps the layer that it wraps in base_layer
    return not any("base_layer" in m._modules or m._forward_hooks or m._forward_pre_hooks for m in tower.modules())


def linear(x: Tensor, weights: Weights, *, gelu: bool = False) -> Tensor:
    """Return x W^T + b of x [..., in], through the exact GELU if asked; float32 on the CPU, without gradients."""
    # what torch.compile makes of a linear layer on a CPU; not every build of torch has it
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        x = F.linear(x, *weights)
        return F.gelu(x) if gelu else x
    return torch.ops.mkldnn._linear_pointwise(x, *weights, *(("gelu", [], "none") if gelu else ("none", [], "")))


def embed_patches(pixels: Tensor, convolution: nn.Module, class_token: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens [N, 1 + patches, D] of pixels [N, 3, h, w]; positions [1 + patches, D] are added."""
    patches = convolution(pixels).flatten(2).transpose(1, 2)
    return torch.cat([class_token.expand(len(pixels), 1, -1), patches], dim=1) + positions


def embed_words(tokens: Tensor, read: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """Return the tokens [N, L, D] of ids [N, >= L], where L is just enough for the places `read` [N]."""
    length = int(read.max()) + 1
    return F.embedding(tokens[:, :length], table) + positions[:length]


def run(blocks: Sequence[Block], x: Tensor, read: Tensor, *, causal: bool) -> Tensor:
    """Return what the blocks make of x [N, L, D] at the token `read` [N] of each row, [N, D]."""
    *others, last = blocks
    for block in others:
        x = _forward(block, x, x, is_causal=causal)
    rows, places = torch.arange(len(x)), torch.arange(x.shape[1])
    seen = (places <= read[:, None])[:, None, None] if causal else None  # [N, 1, 1, L]
    return _forward(last, x[rows, read].unsqueeze(1), x, attn_mask=seen).squeeze(1)


def _forward(block: Block, x: Tensor, context: Tensor, **how) -> Tensor:
    """Return what a block makes of x [N, M, D] that attends to all of context [N, L, D]."""
    normed = block.norm_1(context)
    own = normed if x is context else block.norm_1(x)
    parts = ((own, block.query), (normed, block.key), (normed, block.value))
    query, key, value = (linear(y, w).unflatten(-1, (block.heads, -1)).transpose(1, 2) for y, w in parts)
    attended = F.scaled_dot_product_attention(query, key, value, **how).transpose(1, 2).flatten(2)
    x = x + linear(attended, block.out)
    hidden = linear(block.norm_2(x), block.up, gelu=block.act is None)
    return x + linear(hidden if block.act is None else block.act(hidden), block.down)


def transformers_blocks(layers: Sequence[nn.Module]) -> list[Block]:
    """Return the blocks of a CLIPEncoder of transformers."""
    return [_transformers_block(layer) for layer in layers]


def _transformers_block(layer: nn.Module) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    is_gelu = attention.config.hidden_act == "gelu"
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return Block(
        attention.num_heads,
        layer.layer_norm1,
        *(_weights(getattr(attention, name)) for name in names),
        layer.layer_norm2,
        _weights(mlp.fc1),
        _weights(mlp.fc2),
        None if is_gelu else mlp.activation_fn,
    )


def open_clip_blocks(blocks: Sequence[nn.Module]) -> list[Block]:
    """Return the blocks of a Transformer of open_clip that has no option beyond its sizes and activation."""
    return [_open_clip_block(block) for block in blocks]


def _open_clip_block(block: nn.Module) -> Block:
    attention = block.attn
    parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    out, up, down = (_weights(module) for module in (attention.out_proj, block.mlp.c_fc, block.mlp.c_proj))
    act = None if type(block.mlp.gelu) is nn.GELU else block.mlp.gelu
    return Block(attention.num_heads, block.ln_1, *parts, out, block.ln_2, up, down, act)


def _weights(module: nn.Module) -> Weights:
    return module.weight, module.bias
