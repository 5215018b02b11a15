"""What a model is, without reading its weights: where it lies, its family, and whether it can be loaded and trained."""

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from diffalign.backbones import marks, published, single_file
from diffalign.backbones.base import TEXT_ENCODERS, Backbone
from diffalign.backbones.denoiser_file import DenoiserFile
from diffalign.backbones.families import BY_NAME, DENOISERS, FAMILIES, PIPELINES, family_of
from diffalign.backbones.files import (
    LORA_FILE,
    PICKLE_SUFFIXES,
    check_weights,
    load_errors,
    pickle_message,
    read_header,
)
from diffalign.backbones.transformer import TransformerBackbone
from diffalign.errors import ModelError, suggestion
from diffalign.places import local, looks_local


def located(source: str | Path) -> str:
    """Return the path that `source` names from here or among what ships, or the hub id that it is.

    Raises:
        ModelError: it is neither, or a file of the wrong kind.
    """
    path = local(source)
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelError(pickle_message(path) if path.is_file() else f'There is no file "{source}".')
    if path.is_file() and path.suffix == ".gguf":
        raise ModelError(
            f'"{source}" is a GGUF file: quantised weights, which are not read here. Give the .safetensors file in '
            "bfloat16 or float16; model.quantization then keeps a frozen base in few bits (docs/quantization.md)."
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise ModelError(f'"{source}" is not a .safetensors file. Give a diffusers folder, a hub id or such a file.')
    if path.exists() or not looks_local(str(source)):
        return str(path) if path.exists() else str(source)
    parent = next((folder for folder in path.absolute().parents if folder.is_dir()), Path("/"))
    near = suggestion(str(source), [str(path.parent / entry.name) for entry in parent.iterdir()])
    raise ModelError(
        f'There is no model at "{source}" (the nearest existing folder is "{parent}").{near} '
        'Give a diffusers folder, a .safetensors file or a hub id such as "stabilityai/stable-diffusion-xl-base-1.0".'
    )


def read_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """Return the parsed model_index.json of a diffusers pipeline of a supported family.

    Raises:
        ModelError: it is missing, or names another family.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ModelError(f'"{source}" is not a diffusers pipeline: it has no model_index.json. {_folder_hint(folder)}')
    with load_errors("model_index.json", source):
        index = dict(DiffusionPipeline.load_config(source, revision=revision))
    family_of(index.get("_class_name"), source)
    return index


def family_at(source: str | Path, revision: str | None = None) -> type[Backbone]:
    """Return the family of a model by its index, or by the names of a single file's tensors; no weights are read.

    Raises:
        ModelError: it is missing, or of no supported family.
    """
    source = located(source)
    if Path(source).is_file():
        return BY_NAME["sdxl" if single_file.family_of(Path(source)) == "sdxl" else "sd15"]
    return family_of(read_index(source, revision)["_class_name"], source)


def transformer_family(hub_id: str) -> type[TransformerBackbone] | None:
    """Return the family of transformers that a hub id names, None if it names none."""
    transformers = [family for family in FAMILIES if issubclass(family, TransformerBackbone)]
    found = [family for family in transformers if family.hub_mark.lower() in hub_id.lower()]
    return max(found, key=lambda family: len(family.hub_mark), default=None)


def check(
    source: str,
    resolution: int,
    *,
    vae: str | None = None,
    unet_init: str | None = None,
    variant: str | None = None,
) -> None:
    """Refuse what `load` refuses for training, as far as paths, configurations and headers of weights say.

    Of what is on the hub only the name is looked at.

    Raises:
        ModelError: as `load` raises it.
    """
    for place in (vae, unet_init):
        if place is not None:
            located(place)
    folder = Path(located(source))
    if unet_init is not None and (file := denoiser_file(unet_init)) is not None:
        if issubclass(file.kind, TransformerBackbone):
            file.kind.check_name(str(file.path))
        check_denoiser(file, source)
    if folder.is_file():
        single_file.family_of(folder)
        marks.schedule_hints(folder)
        if vae is None:
            single_file.check_vae(folder)
    elif folder.is_dir():
        index = read_index(str(folder))
        family = PIPELINES[index["_class_name"]]
        replaced = {name for name, given in (("vae", vae), (family.denoiser_name, unet_init)) if given is not None}
        check_trainable(str(folder), family, resolution)
        for name in (family.denoiser_name, "vae", *TEXT_ENCODERS):
            if name not in replaced and index.get(name, (None,))[0] is not None:
                check_weights(folder / name, variant)
    elif (named := transformer_family(source)) is not None:
        named.check_name(source)


def denoiser_config(source: str, family: type[Backbone], revision: str | None = None) -> dict[str, Any]:
    """Return the configuration of a pipeline's denoiser, of a folder or a hub id."""
    with load_errors("the configurations", source):
        return family.denoiser_class.load_config(source, subfolder=family.denoiser_name, revision=revision)


def denoiser_file(place: str | Path) -> DenoiserFile | None:
    """Return the header of the file with a denoiser that `place` names, None if it names no file.

    Raises:
        ModelError: it is a file without one.
    """
    path = Path(located(place))
    if not path.is_file():
        return None
    if (found := DenoiserFile.find(path)) is not None:
        return found
    raise ModelError(
        f'"{path}" holds no UNet or transformer of a supported family; its tensors are named like '
        f'"{min(read_header(path).keys() - {"__metadata__"}, default="(none)")}". A LoRA is merged, or given to the '
        "commands that draw; of other networks give the diffusers folder."
    )


def check_denoiser(file: DenoiserFile, source: str) -> None:
    """Refuse a file that cannot replace the denoiser of `source`, as far as headers and configurations here say.

    Raises:
        ModelError: it is quantised, or does not fit.
    """
    name, config = located(source), None
    if Path(name).is_dir():
        family = family_of(read_index(name)["_class_name"], name)
        config = denoiser_config(name, family)
    elif (family := transformer_family(name)) is not None:
        config = published.TRANSFORMERS[family.family].get(name)
    elif Path(name).is_file():
        family = family_at(name)
    else:
        return file.check_dtypes()  # a UNet's pipeline on the hub
    file.check(family, config, f'"{name}"')


def check_trainable(source: str, family: type[Backbone], resolution: int, revision: str | None = None) -> None:
    """Refuse what the configurations of a folder or a hub id show cannot be trained, without reading weights.

    Raises:
        ModelError: such a model or resolution.
    """
    denoiser = denoiser_config(source, family, revision)
    with load_errors("the configurations", source):
        vae = family.vae_class.load_config(source, subfolder="vae", revision=revision)
        if issubclass(family, TransformerBackbone):
            loader = FlowMatchEulerDiscreteScheduler  # of whichever class it is: a dictionary is read
            scheduler = loader.load_config(source, subfolder="scheduler", revision=revision)
            family.check_index(source, read_index(source, revision))
            family.check_schedule(source, denoiser, scheduler)
    family.check_trainable(source, denoiser, vae, resolution)


def _folder_hint(folder: Path) -> str:
    if (folder / LORA_FILE).is_file():
        return "It holds a LoRA: give the base model here, and the LoRA to evaluation."
    if any((folder / name).is_dir() for name in DENOISERS) or (folder / "config.json").is_file():
        return "It holds a single network: give it as unet_init (or vae), and a whole model here."
    return f"It holds: {', '.join(sorted(entry.name for entry in folder.iterdir())[:8]) or 'nothing'}."
