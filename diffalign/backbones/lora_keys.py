"""The keys of LoRA files, of whichever program: which network and layer a tensor belongs to, and what it is there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# What may stand before the name of a layer, longest first. Names below a flat one have "_" for their dots.
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
TEXT_FLAT = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te_": "text_encoder"}
TEXT_DOTTED = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
OTHER_TEXT = ("text_encoder_3.", "text_encoders.", "lora_te3_", "lora_te")  # T5 and language models: no CLIP
ENDS = {  # of the keys of the two factors; the name in lora_A.NAME.weight is peft's of the adapter
    "down": re.compile(r"(\.lora_A(\.\w+)?|\.lora_down|\.lora\.down|_lora\.down|\.lora_linear_layer\.down)\.weight"),
    "up": re.compile(r"(\.lora_B(\.\w+)?|\.lora_up|\.lora\.up|_lora\.up|\.lora_linear_layer\.up)\.weight"),
    "alpha": re.compile(r"\.alpha"),
}
# What is no LoRA of two factors, by a piece of its keys.
OTHERS = {
    "dora_scale": "a DoRA, whose magnitudes no two factors hold",
    "lora_magnitude_vector": "a DoRA, whose magnitudes no two factors hold",
    "hada_": "a LoHa (LyCORIS)",
    "lokr_": "a LoKr (LyCORIS)",
    "oft_": "an OFT adapter",
    "lora_mid": "a LoCon with a third factor (Tucker decomposition)",
    "lora_A.bias": "a LoRA with biases",
    "lora_B.bias": "a LoRA with biases",
    ".diff": "differences of whole weights beside the factors",
    "_norm": "differences of norms beside the factors",
    "_lora1.": "an XLabs LoRA of FLUX.1, which diffusers' load_lora_weights reads and save_lora_adapter writes anew",
    "_lora2.": "an XLabs LoRA of FLUX.1, which diffusers' load_lora_weights reads and save_lora_adapter writes anew",
    "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion",
}


@dataclass(frozen=True)
class Place:
    """Say which layer a key names."""

    name: str
    flat: bool  # dots of the name are written "_"
    network: str  # "denoiser", or the pipeline's name of a text encoder; "other text" for those no layout knows
    prefix: str  # what stood before the name


@dataclass
class Keys:
    """Hold the keys of a file: those of each layer by what they are ("down", "up", "alpha"), and those of no LoRA."""

    layers: dict[Place, dict[str, str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Keys":
        """Sort the names of a file's tensors."""
        keys = cls()
        for name in names:
            for role, pattern in ENDS.items():
                match = re.fullmatch(rf"(?P<stem>.+?)(?P<end>{pattern.pattern})", name)
                if match:
                    keys.layers.setdefault(_place(match["stem"], match["end"]), {})[role] = name
                    break
            else:
                keys.others.append(name)
        return keys

    @property
    def layout(self) -> str:
        """Return whose layout this is, in a word."""
        prefixes = [place.prefix for place in self.layers if place.network == "denoiser"]
        kinds = {"lora_": "kohya", "lycoris_": "kohya", "diffusion_model.": "comfy", "model.": "comfy"}
        kinds |= {"base_model.": "peft", "transformer.": "diffusers", "unet.": "diffusers"}
        found = [kind for start, kind in kinds.items() if any(prefix.startswith(start) for prefix in prefixes)]
        return "several layouts" if len(found) > 1 else next(iter(found), "no prefix")


def why_not(key: str) -> str | None:
    """Return what a key that belongs to no pair of factors belongs to, None if that is unknown."""
    return next((meaning for piece, meaning in OTHERS.items() if piece in key), None)


def _place(stem: str, end: str) -> Place:
    stem = stem.replace(".processor", "")
    if end.startswith("_lora") and stem.endswith("to_out"):  # diffusers before peft
        stem += ".0"
    for prefix, network in TEXT_FLAT.items():
        if stem.startswith(prefix):
            return Place(stem.removeprefix(prefix), True, network, prefix)
    for prefix, network in TEXT_DOTTED.items():
        if stem.startswith(prefix):
            return Place(_clip(stem.removeprefix(prefix)), False, network, prefix)
    if stem.startswith(OTHER_TEXT):
        return Place(stem, False, "other text", "")
    for prefix in FLAT:
        if stem.startswith(prefix):
            return Place(stem.removeprefix(prefix), True, "denoiser", prefix)
    before = ""
    while prefix := next((prefix for prefix in DOTTED if stem.startswith(prefix)), None):
        before, stem = before + prefix, stem.removeprefix(prefix)
    return Place(stem, False, "denoiser", before)


def _clip(name: str) -> str:
    """Return the name of a layer of CLIP as its checkpoints have it, of one that diffusers had before peft."""
    name = re.sub(r"self_attn\.to_([qkv])$", r"self_attn.\1_proj", name)
    name = re.sub(r"self_attn\.to_out(\.0)?$", "self_attn.out_proj", name)
    return name if name.startswith("text_model.") else f"text_model.{name}"
