"""LoRA adapters on a denoiser (Hu et al. 2021, arXiv:2106.09685): add, switch off, collect, freeze."""

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.errors import ModelError, suggestion
from diffalign.vocabulary import ATTENTION, BLOCKS

ADAPTER = "default"
LAYERS = (nn.Linear, nn.Conv2d)  # what can be adapted
# How A starts. B is always 0: the adapted network starts as the base, so the DPO logit is exactly 0 at step 0.
INITS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "gaussian": lambda a, generator: nn.init.normal_(a, std=1 / a.shape[0], generator=generator),
    "kaiming": lambda a, generator: nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator),
}


def add_lora(
    denoiser: nn.Module,
    rank: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = ATTENTION,
    dropout: float = 0.0,
    init: str = "gaussian",
    seed: int = 0,
    blocks: Sequence[str] = BLOCKS,
    idle: Sequence[str] = (),
) -> list[nn.Parameter]:
    """Freeze `denoiser`, add LoRA layers to it and return their parameters, in float32.

    W x becomes W x + alpha / rank * B A x, with B = 0 at the start.

    Args:
        denoiser: a diffusers UNet or transformer without adapters.
        rank: columns of B, at least 1.
        alpha: scale, > 0; `rank` when None, so that the factor is 1.
        target_modules: names, or ends of names, of the Linear and Conv2d modules to adapt.
        dropout: probability in [0, 1) that an input of A is dropped in training.
        init: of A: "gaussian" (std 1/rank, diffusers' scripts) or "kaiming" (uniform, peft's default).
        seed: of A; the same on every device and in every dtype.
        blocks: which parts of a UNet are adapted, of BLOCKS; what belongs to none of them is if all are.
        idle: names of layers that are never adapted: the family's `idle_layers`.

    Raises:
        ModelError: an argument is out of range, a target matches no module, or there are adapters already.
    """
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    alpha = rank if alpha is None else alpha
    _check_numbers(rank, alpha, dropout, init)
    if has_adapters(denoiser):
        raise ModelError("This network has adapters already. Load it again, or fuse them first.")
    _check_blocks(denoiser, blocks)
    excluded = _excluded(blocks, [*idle, *_containers(denoiser, targets)])
    _check_targets(denoiser, targets, excluded)
    freeze(adaptable(denoiser))
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout, exclude_modules=excluded
    )
    # peft draws numbers too, which _start replaces; and it warns that it could not merge into weights of torchao.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")
        denoiser.add_adapter(config, adapter_name=ADAPTER)
    _start(denoiser, INITS[init], seed)
    return trainable_parameters(denoiser)


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Run the base network inside the `with` block; the adapters return afterwards, also after an exception.

    Works on a wrapped network (DDP, compiled) too. A training loop uses `adapter_switch`, which searches once.

    Raises:
        ModelError: there are no adapters, so that the block would run the network unchanged.
    """
    with adapter_switch(denoiser)():
        yield


def adapter_switch(denoiser: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return `adapters_off` for the adapter layers that `denoiser` has now, found once and not at every use.

    Raises:
        ModelError: there are no adapters.
    """
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ModelError("This network has no adapters to switch off. Call add_lora first.")

    @contextmanager
    def off() -> Iterator[None]:
        # peft's own enable_adapters also rewrites requires_grad of every adapter weight: 30 ms a pass on SDXL, and
        # weights somebody froze would come back trainable.
        before = [layer.disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled

    return off


def adapter_mix(denoiser: nn.Module, factors: Mapping[str, float]) -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which the adapters named in `factors` act, times these, and no others.

    W x becomes W x + sum_i factor_i * alpha_i / rank_i * B_i A_i x. The layers are found once; requires_grad stays.

    Raises:
        ModelError: an adapter is fused into its layer, where it acts whatever is switched.
    """
    layers = _adapter_layers(denoiser)
    states = [
        ([name for name in factors if name in layer.scaling], layer.scaling | _scaled(layer.scaling, factors))
        for layer in layers
    ]

    @contextmanager
    def mixed() -> Iterator[None]:
        before = [(layer._active_adapter, layer.scaling, layer.disable_adapters) for layer in layers]
        try:
            for layer, (active, scaling) in zip(layers, states, strict=True):
                layer._active_adapter, layer.scaling, layer._disable_adapters = active, scaling, False
            yield
        finally:
            for layer, (active, scaling, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer.scaling, layer._disable_adapters = active, scaling, disabled

    return mixed


def active_adapters(denoiser: nn.Module) -> list[str]:
    """Return the names of the adapters that act in any layer of `denoiser`, in peft's order."""
    acting = [layer for layer in _adapter_layers(denoiser) if not layer.disable_adapters]
    return list(dict.fromkeys(name for layer in acting for name in layer.active_adapters if name in layer.scaling))


def activate(denoiser: nn.Module, names: Sequence[str]) -> None:
    """Let the adapters `names` act from now on, as they are scaled, and no others; requires_grad stays."""
    for layer in _adapter_layers(denoiser):
        layer._active_adapter = [name for name in names if name in layer.scaling]


def free_name(denoiser: nn.Module) -> str:
    """Return a name for one more adapter: diffusers' own choice can be taken where two LoRAs adapt different layers."""
    return next(name for number in count() if (name := f"default_{number}") not in getattr(denoiser, "peft_config", {}))


def count_adapted(denoiser: nn.Module, name: str) -> int:
    """Return how many layers of `denoiser` carry the LoRA `name`."""
    return len(adapted_layers(denoiser, name))


def adapted_layers(denoiser: nn.Module, name: str) -> list[str]:
    """Return the names of the layers of `denoiser` that carry the LoRA `name`."""
    return [place for place, part in denoiser.named_modules() if name in getattr(part, "lora_A", ())]


def has_adapters(module: nn.Module) -> bool:
    """Tell whether any layer of `module` carries an adapter."""
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def adaptable(denoiser: nn.Module) -> nn.Module:
    """Give a network diffusers' methods for adapters, in place, where its class lacks them as PixArt's does."""
    if not isinstance(denoiser, PeftAdapterMixin):
        denoiser.__class__ = _with_adapter_methods(type(denoiser))
    return denoiser


def trainable_parameters(denoiser: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, in the order of the network."""
    return [parameter for parameter in denoiser.parameters() if parameter.requires_grad]


def freeze(module: nn.Module) -> nn.Module:
    """Require no gradient for any parameter of `module`, and return it; train/eval mode stays."""
    return module.requires_grad_(False)


@functools.cache
def _with_adapter_methods(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same name, which configurations are saved under."""
    return type(kind.__name__, (kind, PeftAdapterMixin), {"__module__": kind.__module__})


def _adapter_layers(denoiser: nn.Module) -> list[BaseTunerLayer]:
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ModelError("An adapter is fused into the network, so it cannot be switched. Call unfuse_lora() first.")
    return layers


def _excluded(blocks: Sequence[str], idle: Sequence[str]) -> str | None:
    """Return a pattern of the names of modules that are idle or lie in none of the blocks, None if there are none."""
    patterns = [re.escape(name) for name in idle]
    if not set(blocks) >= set(BLOCKS):
        inside = "|".join(f"{block}_block" for block in blocks)
        patterns.append(rf"(?!({inside})).*")
    return "|".join(patterns) or None


def _containers(denoiser: nn.Module, targets: list[str]) -> list[str]:
    """Return the names of modules that are called like a target and are no layers, which peft would refuse.

    Such is `to_out`: a layer in the blocks of FLUX.2 that have one stream, and a list of layers in those of two.
    """
    others = [name for name, module in denoiser.named_modules() if not isinstance(module, LAYERS)]
    return [name for name in others if any(_named(name, target) for target in targets)]


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _scaled(scaling: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    return {name: value * factors[name] for name, value in scaling.items() if name in factors}


def _start(denoiser: nn.Module, init: Callable[[Tensor, torch.Generator], Tensor], seed: int) -> None:
    # peft makes the adapters in the dtype of the base. A step of 1e-6 would be lost in bfloat16 weights, and A would
    # depend on the dtype; so they become float32, and A is drawn on the CPU.
    generator = torch.Generator().manual_seed(seed)
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            a.data, b.data = a.data.float(), b.data.float()
            a.data.copy_(init(torch.empty(a.shape), generator))


def _check_numbers(rank: int, alpha: float, dropout: float, init: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ModelError(f"LoRA rank must be an integer of at least 1, got {rank!r}. Usual: 4 to 128.")
    if not alpha > 0:
        raise ModelError(f"LoRA alpha must be > 0, got {alpha!r}. Leave it out to use the rank ({rank}).")
    if not 0 <= dropout < 1:
        raise ModelError(f"LoRA dropout must be in [0, 1), got {dropout!r}.")
    if init not in INITS:
        raise ModelError(f'Unknown LoRA init "{init}".{suggestion(init, INITS)} Available: {", ".join(INITS)}.')


def _check_blocks(denoiser: nn.Module, blocks: Sequence[str]) -> None:
    if unknown := sorted(set(blocks) - set(BLOCKS)):
        raise ModelError(f'Unknown LoRA block "{unknown[0]}". Available: {", ".join(BLOCKS)}.')
    if not set(blocks) >= set(BLOCKS) and not hasattr(denoiser, "down_blocks"):
        raise ModelError(
            f"lora.blocks [{', '.join(blocks)}] names parts of a UNet; a {type(denoiser).__name__} has none of them. "
            f"Use all ([{', '.join(BLOCKS)}]), and lora.lora_target_modules to choose layers."
        )


def _check_targets(denoiser: nn.Module, targets: list[str], excluded: str | None) -> None:
    outside = re.compile(excluded or r"(?!)")
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, LAYERS)]
    adaptable = [name for name in layers if not outside.fullmatch(name)]
    if not targets:
        raise ModelError("target_modules is empty: name at least one module, such as to_q.")
    for target in targets:
        # peft ignores a target without a match as long as another one has some.
        if not any(_named(name, target) for name in adaptable):
            endings = {".".join(name.split(".")[-size:]) for name in adaptable for size in (1, 2)}
            raise ModelError(
                f'LoRA target "{target}" matches no Linear or Conv2d module.{suggestion(target, endings)} '
                f"The attention layers are {', '.join(ATTENTION)}."
            )
