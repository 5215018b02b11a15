"""A denoiser in one .safetensors file, in the names of its original code or of diffusers: what it is, and its weights.

diffusers renames and splits the tensors. What fits is found out beforehand, by the same conversion of the shapes in the
file's header, because diffusers passes over what a file lacks or has too much.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors import safe_open
from torch import Tensor, nn

from diffalign.backbones import published
from diffalign.backbones.base import Backbone
from diffalign.backbones.families import FAMILIES
from diffalign.backbones.files import load_errors, quiet_diffusers, read_header
from diffalign.errors import ModelError

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of whole checkpoints, and of files of ComfyUI
POSITIONS = ("pos_embed", "pos_embed.pos_embed")  # SD3's table of positions, which is fixed
DTYPES = ("F32", "F16", "BF16")
# Ends of names that only quantised weights have, of ComfyUI's, bitsandbytes' and other programs.
QUANTIZED = re.compile(
    r"(^|\.)(scaled_fp8|comfy_quant|(weight|input)_scale(_\d)?|scale_(weight|input)|absmax|quant_map|qweight|qzeros"
    r"|weight\.(quant_state.*|nested_absmax))$"
)
# Norms in files of ComfyUI's newer nodes; diffusers knows the name that Black Forest Labs gave.
NORM = re.compile(r"(blocks\.\d+\..*norm\.(?:query|key)_norm)\.weight$")


@dataclass(frozen=True)
class DenoiserFile:
    """Hold the header of a file with a denoiser; besides it there may be a VAE and text encoders, which stay unread."""

    path: Path
    kind: type[Backbone]  # of the two families of UNets the first
    keys: Mapping[str, str]  # of the denoiser: the original code's or diffusers' name -> the name in the file
    header: Mapping[str, Any]

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """Return the file if a denoiser of a supported family is in it, told by names; None for LoRAs and all else."""
        header = {name: entry for name, entry in read_header(path).items() if name != "__metadata__"}
        if any("lora" in name for name in header):
            return None
        prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in header)), "")
        names = {name.removeprefix(prefix): name for name in header if name.startswith(prefix)}
        kind = next((kind for kind in FAMILIES if any(name.startswith(kind.file_marks) for name in names)), None)
        if kind is None:
            return None
        if kind.family == "flux":
            names = {NORM.sub(r"\1.scale", name): key for name, key in names.items()}
        return cls(path, kind, names, header)

    @property
    def parameters(self) -> int:
        """Return how many parameters the denoiser has."""
        return sum(prod(self.header[key]["shape"]) for name, key in self.keys.items() if name not in POSITIONS)

    @property
    def dtype(self) -> str:
        """Return the dtype of most of its tensors, as headers write it."""
        return Counter(self.header[key]["dtype"] for key in self.keys.values()).most_common(1)[0][0]

    @property
    def what(self) -> str:
        """Say what it is, for messages."""
        word = "UNet" if self.kind.denoiser_name == "unet" else f"{self.kind.denoiser_name} of {self.kind.family}"
        return f"{word} with {self.parameters:,} parameters in {self.dtype}"

    @cached_property
    def published_like(self) -> str | None:
        """Return the hub id of the first published transformer of these shapes, None if there is none."""
        for hub_id, config in published.TRANSFORMERS.get(self.kind.family, {}).items():
            if not self._misfits(self.kind, config):
                return hub_id
        return None

    @property
    def pipeline(self) -> str:
        """Name a pipeline to put it into: the published one of its shapes, else the first of the family."""
        return self.published_like or next(iter(published.TRANSFORMERS[self.kind.family]))

    def check(self, family: type[Backbone], config: Mapping[str, Any] | None, source: str) -> None:
        """Refuse what cannot take the denoiser's place in the pipeline `source`; only the header is read.

        Args:
            family: of the pipeline.
            config: of the pipeline's denoiser; None if it is not here, which leaves the family and the dtypes to check.
            source: what messages call the pipeline.

        Raises:
            ModelError: it is quantised, of another family or size, or lacks tensors or has unknown ones.
        """
        self.check_dtypes()
        if self.kind.denoiser_class is not family.denoiser_class:
            also = "" if self.kind.denoiser_name == "unet" else f', such as "{self.pipeline}"'
            raise ModelError(
                f'"{self.path}" holds a {self.what}, but {source} is a pipeline of {family.family}. Give a file of '
                f"that family, or a pipeline of the file's{also} as the model."
            )
        if config is not None and (misfits := self._misfits(family, config)):
            like = None if self.kind.denoiser_name == "unet" else self.published_like
            fix = f'It has the shapes of "{like}": give that, or its folder, as the model.' if like else (
                "Give the folder or hub id of the model that it was made from, or download the file again."
            )  # fmt: skip
            raise ModelError(
                f'"{self.path}" holds a {self.what}, which does not fit the {family.denoiser_name} of {source}: '
                f"{misfits}. {fix}"
            )

    def check_dtypes(self) -> None:
        """Refuse quantised weights.

        Raises:
            ModelError: there are such.
        """
        odd = [key for key in self.keys.values() if self.header[key]["dtype"] not in DTYPES]
        odd += [key for key in (*self.keys.values(), *self.header) if QUANTIZED.search(key)]
        if odd:
            raise ModelError(
                f'"{self.path}" is quantised: "{odd[0]}" is {self.header[odd[0]]["dtype"]}. What was lost there is '
                "not read here. Give the file in bfloat16, float16 or float32; model.quantization then keeps a frozen "
                "base in few bits (docs/quantization.md)."
            )

    def load(self, family: type[Backbone], config: Mapping[str, Any], source: str, torch_dtype: torch.dtype) -> Any:
        """Return the denoiser with the weights of the file; arguments and errors as of `check`."""
        self.check(family, config, source)
        with load_errors(f"the {family.denoiser_name}", str(self.path)), safe_open(self.path, "pt") as file:
            tensors = self._named({key: file.get_tensor(key) for key in self.keys.values()})
            with tempfile.TemporaryDirectory() as folder, quiet_diffusers():
                Path(folder, "config.json").write_text(json.dumps(_settings(config)), encoding="utf-8")
                return family.denoiser_class.from_single_file(
                    tensors, config=folder, torch_dtype=torch_dtype, local_files_only=True
                )

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the file under the names that diffusers' conversion knows."""
        # That of UNets takes whole checkpoints alone.
        is_unet = self.kind.denoiser_name == "unet" and any(name.startswith("input_blocks.") for name in self.keys)
        prefix = PREFIXES[0] if is_unet else ""
        return {prefix + name: tensors[key] for name, key in self.keys.items()}

    def _misfits(self, family: type[Backbone], config: Mapping[str, Any]) -> str:
        """Say how the file's tensors differ from a denoiser of this configuration, "" if they do not."""
        with torch.device("meta"), quiet_diffusers():
            network = family.denoiser_class.from_config(_settings(config))
        wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
        shapes = {key: torch.empty(self.header[key]["shape"], device="meta") for key in self.keys.values()}
        try:
            found, unread = _convert(self._named(shapes), wanted, network)
        except (KeyError, IndexError) as error:  # diffusers asks for each tensor by its name
            return f'it lacks tensors, such as "{error.args[0]}"'
        except (RuntimeError, ValueError, TypeError) as error:
            return f"diffusers cannot convert it ({' '.join(str(error).split())[:150]})"
        missing = [name for name in wanted if name not in found]
        unknown = [*unread, *(name for name in found if name not in wanted)]
        other = [name for name in wanted if name in found and found[name] != wanted[name]]
        parts = [f'it lacks {len(missing)} tensors, such as "{missing[0]}"'] if missing else []
        parts += [f'it has {len(unknown)} that have no place there, such as "{unknown[0]}"'] if unknown else []
        if other:
            sizes = f"{list(found[other[0]])}, not {list(wanted[other[0]])}"
            parts.append(f'{len(other)} are of another size, such as "{other[0]}": {sizes}')
        return "; ".join(parts)


def _convert(
    tensors: dict[str, Tensor], wanted: Mapping[str, torch.Size], network: nn.Module
) -> tuple[dict[str, torch.Size], list[str]]:
    """Return the shapes that diffusers makes of `tensors`, by its names, and what it leaves unread."""
    if not (tensors.keys() <= wanted.keys() or wanted.keys() <= tensors.keys()):  # else the names are diffusers'
        conversion = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
        converted = conversion(checkpoint=tensors, config=network.config)
        unread = [] if converted is tensors else list(tensors)  # what it reads it takes out
        if hasattr(network, "down_blocks"):  # but for UNets, of which each tensor becomes one
            unread = unread[: max(len(tensors) - len(converted), 0)]
        return {name: tensor.shape for name, tensor in converted.items()}, unread
    return {name: tensor.shape for name, tensor in tensors.items()}, []


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
