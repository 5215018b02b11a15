"""Attention of the UNets: whose kernel runs it, and the text's keys and values once for the images of an example.

softmax(Q K^T / sqrt(d)) V with Q of every image and K, V of its prompt. Winner and loser have the same prompt, so K and
V are projected for B prompts and repeated for N = k*B images [first images, second images, ...].

diffusers' `unet.set_attention_backend` does nothing here: these UNets call torch's function directly. So the choice is
made where the function is called. It then holds in a checkpoint's recomputation, and not in the text encoders.
"""

import logging
from contextlib import AbstractContextManager, nullcontext

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.backbones.fused_lora import project
from diffalign.errors import ModelError, suggestion

logger = logging.getLogger(__name__)
KERNELS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def backend(name: str) -> AbstractContextManager[None]:
    """Return a context in which torch's attention runs the kernel `name`, or torch's choice if "default".

    A shape that the kernel cannot run is a RuntimeError inside: `attention_probe.probe` tells before.

    Raises:
        ModelError: there is no such kernel.
    """
    if name == "default":
        return nullcontext()
    if name not in KERNELS:
        known = ("default", *KERNELS)
        raise ModelError(f'Unknown attention kernel "{name}".{suggestion(name, known)} Known: {", ".join(known)}.')
    return sdpa_kernel(KERNELS[name])


class UNetAttention(AttnProcessor2_0):
    """Attend as diffusers does, with a kernel of choice, fused LoRA projections and text shared by several images.

    The q, k and v of self-attention read the same tokens, k and v of cross attention the same text: where `fuse_lora`
    fused them, they run as one function.
    """

    def __init__(self, kernel: str = "default"):
        super().__init__()
        backend(kernel)  # an unknown name is an error here and not in the first pass
        self.kernel = kernel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return [N,S,C] for tokens [N,S,C] and, in cross attention, text [B,L,D]: entry i is that of i, i + B ..."""
        if attention_mask is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if encoder_hidden_states is None:
            query, key, value = project((attn.to_q, attn.to_k, attn.to_v), hidden_states)
        else:
            query = attn.to_q(hidden_states)
            key, value = project((attn.to_k, attn.to_v), encoder_hidden_states)
        copies = len(query) // len(key)
        if copies > 1:
            key, value = key.repeat(copies, 1, 1), value.repeat(copies, 1, 1)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        with backend(self.kernel):
            attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))


def use_backend(denoiser: nn.Module, name: str = "default") -> int:
    """Let every attention of `denoiser` run as `UNetAttention` with the kernel `name`, and return how many there are.

    Call it on a UNet as it is loaded, before it is wrapped, compiled or copied. All of them take part or none: with
    xformers or other foreign processors the UNet is left alone, a warning says so, and the result is 0.

    Raises:
        ModelError: there is no such kernel.
    """
    processor = UNetAttention(name)
    layers = [attn for attn in denoiser.modules() if isinstance(attn, Attention)]
    foreign = [attn for attn in layers if not _replaceable(attn)]
    if foreign:
        logger.warning(
            "%d attention layers run as %s, which stays: no choice of kernel, shared text or fused projections here.",
            len(foreign),
            type(foreign[0].processor).__name__,
        )
        return 0
    for attn in layers:
        attn.set_processor(processor)
    return len(layers)


def share_text(denoiser: nn.Module) -> int:
    """Let `denoiser` take text of B entries for k*B latents; return how many layers then share K and V.

    As in `use_backend`, it is all or none; a kernel chosen before stays.
    """
    layers = [attn for attn in denoiser.modules() if isinstance(attn, Attention)]
    kernels = {getattr(attn.processor, "kernel", "default") for attn in layers}
    if not layers or not use_backend(denoiser, kernels.pop()):
        return 0
    denoiser.shares_text = True
    return sum(isinstance(part, BasicTransformerBlock) and part.attn2 is not None for part in denoiser.modules())


def shares_text(denoiser: nn.Module) -> bool:
    """Tell whether `denoiser`, wrapped (DDP, compiled) or not, takes text of B entries for k*B latents."""
    return getattr(getattr(denoiser, "module", denoiser), "shares_text", False)


def _replaceable(attn: Attention) -> bool:
    """Tell whether an attention is torch's on tokens, without the norms and residuals of other architectures."""
    extras = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    plain = all(part is None for part in extras) and not attn.residual_connection and attn.rescale_output_factor == 1
    return plain and type(attn.processor) in (AttnProcessor2_0, UNetAttention)
