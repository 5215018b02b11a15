"""What the layers of a network are called in its original code, after which other programs name the tensors of LoRAs.

A family declares a `LayerNames`. "{}" in a name stands for the number of a block. Original layers may be fused of
several of diffusers' (q, k and v in one matrix), or hold the same numbers in another order.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Rename:
    """Say which layers of diffusers' network make up one of the original network."""

    original: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)  # of the rows of the original, in proportion
    turned: bool = False  # its rows are (shift, scale), diffusers' (scale, shift), if these two are all there is

    def at(self, numbers: tuple[str, ...]) -> "Rename":
        """Return the layer of the blocks with these numbers."""
        return replace(
            self, original=self.original.format(*numbers), parts=tuple(part.format(*numbers) for part in self.parts)
        )


def fused(*parts: str, shares: tuple[int, ...] | None = None) -> Rename:
    """Return the parts of an original layer, one below the other, for `under`; of equal size unless `shares` says."""
    return Rename("", parts, shares or (1,) * len(parts))


def turned(part: str) -> Rename:
    """Return the counterpart of an original layer whose shift comes before its scale, for `under`."""
    return Rename("", (part,), turned=True)


def under(original: str, prefix: str, layers: Mapping[str, str | Rename]) -> tuple[Rename, ...]:
    """Return the layers whose names begin with `original`, and with `prefix` in diffusers' network."""
    renames = []
    for name, entry in layers.items():
        rename = entry if isinstance(entry, Rename) else Rename("", (entry,))
        parts = tuple(prefix + part for part in rename.parts)
        renames.append(replace(rename, original=original + name, parts=parts))
    return tuple(renames)


def same(prefix: str, *names: str) -> tuple[Rename, ...]:
    """Return layers of a prefix that have one name in both networks."""
    return under(prefix, prefix, {name: name for name in names})


@dataclass(frozen=True)
class LayerNames:
    """Hold the names of all layers of a family that a LoRA can adapt, and what its LoRAs look like elsewhere."""

    renames: tuple[Rename, ...]
    network_module: str = "networks.lora"  # of sd-scripts or musubi-tuner, in kohya's metadata
    comfy_original: bool = True  # ComfyUI's files carry the original names; else diffusers', which it knows too
    comfy_alpha: bool = True  # they carry alpha; else it is multiplied in, for readers that know no alpha there
    comfy_is_kohya: bool = False  # ComfyUI has no layout of its own
    text_encoders: tuple[str, ...] = ("lora_te1_", "lora_te2_")  # how kohya's keys of the CLIP encoders begin

    def find(self, name: str, flat: bool = False) -> tuple[Rename, int | None] | None:
        """Return the original layer that `name` means, and which of its parts: None for all of it.

        `name` is of either network; flat: its dots are written "_", as in kohya's keys. Returns None for others.
        """
        exact, patterns = self._flat if flat else self._dotted
        if name in exact:
            return exact[name]
        for pattern, rename, part in patterns:
            if match := pattern.fullmatch(name):
                return rename.at(match.groups()), part
        return None

    def nearest(self, name: str, flat: bool = False) -> str | None:
        """Return the known name that is most like `name`, None if none is like it."""
        numbers = iter(re.findall(r"\d+", name))
        names = {
            re.sub(r"\{\}", lambda _: next(numbers, "0"), entry)
            for rename in self.renames
            for entry in (rename.original, *rename.parts)
        }
        close = difflib.get_close_matches(name, {_flat(entry) for entry in names} if flat else names, n=1)
        return close[0] if close else None

    @cached_property
    def _dotted(self) -> tuple[dict, list]:
        return self._table(str)

    @cached_property
    def _flat(self) -> tuple[dict, list]:
        return self._table(_flat)

    def _table(self, spell) -> tuple[dict, list]:
        exact, patterns = {}, []
        for rename in self.renames:
            for name, part in _spellings(rename):
                if "{}" in name:
                    pattern = re.escape(spell(name)).replace(r"\{\}", r"(\d+)")
                    patterns.append((re.compile(pattern), rename, part))
                else:
                    exact.setdefault(spell(name), (rename, part))
        return exact, patterns


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _spellings(rename: Rename) -> Iterator[tuple[str, int | None]]:
    """Yield the names by which a layer goes; diffusers' first, which decide where both have the same."""
    for part, name in enumerate(rename.parts):
        yield name, part
    yield rename.original, None


# The text encoders of CLIP have the same names everywhere, but for the prefix.
CLIP = LayerNames(
    same(
        "text_model.encoder.layers.{}.",
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
    )
)
