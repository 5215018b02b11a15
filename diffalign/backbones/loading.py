"""Load a backbone from a hub id, a diffusers folder or a single .safetensors file."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffalign.backbones import single_file
from diffalign.backbones.base import Backbone
from diffalign.backbones.files import LORA_FILE, PICKLE_SUFFIXES, check_weights, load_errors, pickle_message
from diffalign.backbones.sd15 import SD15
from diffalign.backbones.sdxl import SDXL
from diffalign.errors import ModelError, suggestion
from diffalign.places import local, looks_local

PIPELINES: dict[str, type[Backbone]] = {"StableDiffusionPipeline": SD15, "StableDiffusionXLPipeline": SDXL}
TEXT_ENCODERS = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


def load(
    pretrained_model_name_or_path: str | Path,
    *,
    vae: str | Path | None = None,
    unet_init: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    prediction_type: str | None = None,
    zero_terminal_snr: bool = False,
    config: str | Path | None = None,
) -> Backbone:
    """Load a text-to-image model on the CPU; each weight is read once, in `torch_dtype`.

    Args:
        pretrained_model_name_or_path: hub id, diffusers folder or single .safetensors file.
        vae: hub id, folder or file of a VAE to use instead, such as "madebyollin/sdxl-vae-fp16-fix".
        unet_init: hub id or folder of a UNet (or of a pipeline with one) to use instead of the model's own.
        revision: branch, tag or commit of a hub id.
        variant: "fp16" to read `*.fp16.safetensors`; does not apply to `vae` and `unet_init`.
        torch_dtype: dtype of all modules.
        prediction_type: "epsilon" or "v_prediction", where the scheduler's own is wrong or missing.
        zero_terminal_snr: rescale the schedule to end in pure noise (arXiv:2305.08891); needs v_prediction.
        config: for a single file only: the diffusers folder or hub id with its configs and tokenizers. By default the
            published ones of SD1.5 and SDXL base, which ship with this package.

    Raises:
        ModelError: the model is missing, broken, pickled, of an unsupported family, or does not fit these options.
    """
    source = located(pretrained_model_name_or_path)
    replacements = {}
    if unet_init is not None:
        replacements["unet"] = load_unet(unet_init, torch_dtype)
    if Path(source).is_file():
        index, modules = _from_file(Path(source), replacements, vae, config, torch_dtype)
        hints = single_file.schedule_hints(Path(source))
        prediction_type = prediction_type or hints.get("prediction_type")
        zero_terminal_snr = zero_terminal_snr or hints.get("zero_terminal_snr", False)
    else:
        if config is not None:
            raise ModelError(f'"config" describes a single .safetensors file, but "{source}" is not one. Drop it.')
        if vae is not None:
            replacements["vae"] = load_vae(vae, torch_dtype, config=source)
        index = read_index(source, revision)
        modules = _from_folder(source, index, replacements, revision, variant, torch_dtype)
    return PIPELINES[index["_class_name"]](
        denoiser=modules["unet"],
        vae=modules["vae"],
        tokenizers=_present(modules, "tokenizer", "tokenizer_2"),
        text_encoders=_present(modules, "text_encoder", "text_encoder_2"),
        scheduler=with_schedule(modules["scheduler"], prediction_type, zero_terminal_snr),
        source=source,
        options={key: value for key, value in index.items() if isinstance(value, bool)},
    )


def check(source: str, *, vae: str | None = None, unet_init: str | None = None, variant: str | None = None) -> None:
    """Refuse what `load` would refuse, as far as paths, configurations and the headers of weights say; loads nothing.

    What is on the hub is not looked at.

    Raises:
        ModelError: as `load` raises it.
    """
    for place in (vae, unet_init):
        if place is not None:
            located(place)
    folder = Path(located(source))
    if folder.is_file():
        single_file.family_of(folder)
    elif folder.is_dir():
        replaced = {name for name, given in (("vae", vae), ("unet", unet_init)) if given is not None}
        for name in read_index(str(folder)).keys() & {"unet", "vae", "text_encoder", "text_encoder_2"} - replaced:
            check_weights(folder / name, variant)


def load_unet(source: str | Path, torch_dtype: torch.dtype) -> UNet2DConditionModel:
    """Load a UNet from a UNet folder, a folder with `unet/`, or a hub id of either kind.

    Raises:
        ModelError: there is none, it is broken, or it lacks weights of its own configuration.
    """
    source = located(source)
    folder = Path(source)
    if folder.exists():
        subfolder = "unet" if (folder / "unet").is_dir() else None
        check_weights(folder / (subfolder or ""))
        return _component(UNet2DConditionModel, source, subfolder, torch_dtype=torch_dtype)
    try:
        return _component(UNet2DConditionModel, source, "unet", torch_dtype=torch_dtype)
    except ModelError as error:
        try:
            return _component(UNet2DConditionModel, source, None, torch_dtype=torch_dtype)
        except ModelError:
            raise error from None


def load_vae(source: str | Path, torch_dtype: torch.dtype, config: str | None = None) -> AutoencoderKL:
    """Load a VAE from a VAE folder, a folder with `vae/`, a hub id or a single file shaped like `config`'s VAE."""
    source = located(source)
    path = Path(source)
    if path.is_file():
        return single_file.load_vae(path, config, torch_dtype)
    subfolder = "vae" if (path / "vae").is_dir() else None
    if path.exists():
        check_weights(path / (subfolder or ""))
    return _component(AutoencoderKL, source, subfolder, torch_dtype=torch_dtype)


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
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ModelError(
            f'"{source}" is a {name}. Supported: SD1.x and SD2.x ({next(iter(PIPELINES))}) and SDXL base '
            f"({list(PIPELINES)[1]}); SD3, Flux and other families are not supported yet."
        )
    return index


def with_schedule(scheduler: Any, prediction_type: str | None, zero_terminal_snr: bool) -> Any:
    """Return `scheduler` with another prediction type or a zero terminal SNR, or unchanged.

    Raises:
        ModelError: the prediction type is unknown, or is epsilon with a zero terminal SNR.
    """
    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise ModelError(f'prediction_type must be "epsilon" or "v_prediction", got "{prediction_type}".')
    config = dict(scheduler.config)
    changes = {} if prediction_type is None else {"prediction_type": prediction_type}
    if zero_terminal_snr:
        if (config | changes).get("prediction_type") != "v_prediction":
            raise ModelError(
                "zero_terminal_snr needs a v_prediction model: where xt is pure noise, an epsilon prediction says "
                'nothing about x0. Set prediction_type="v_prediction" if the model was trained so.'
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in config:
            scheduler = DDIMScheduler()  # PNDM and others have no such option; DDIM reads the same settings
    return type(scheduler).from_config(config | changes) if changes else scheduler


def located(source: str | Path) -> str:
    """Return the path that `source` names from here or among what ships, or the hub id that it is.

    Raises:
        ModelError: it is neither, or a file of the wrong kind.
    """
    path = local(source)
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelError(pickle_message(path) if path.is_file() else f'There is no file "{source}".')
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


def _from_folder(
    source: str,
    index: dict[str, Any],
    replacements: dict[str, Any],
    revision: str | None,
    variant: str | None,
    torch_dtype: torch.dtype,
) -> dict[str, Any]:
    modules = dict(replacements)
    names = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    missing = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"} - {*names, *modules}
    if missing:
        raise ModelError(
            f'The model_index.json of "{source}" names no {", ".join(sorted(missing))}. '
            "Refiners and partial pipelines cannot be trained here: use the base model."
        )
    for name in names:
        loader = _loader(name, index[name][1], source)
        if loader is None or name in modules:
            continue
        options: dict[str, Any] = {"revision": revision}
        if issubclass(loader, torch.nn.Module):
            options |= {"torch_dtype": torch_dtype, "variant": variant}
            if Path(source).is_dir():
                check_weights(Path(source) / name, variant)
        modules[name] = _component(loader, source, name, **options)
    return modules


def _loader(name: str, class_name: str, source: str) -> type | None:
    """Return the class that loads the component `name`, or None for those that training has no use for."""
    if name in ("unet", "vae"):
        return UNet2DConditionModel if name == "unet" else AutoencoderKL
    if name.startswith("tokenizer"):
        return CLIPTokenizer
    if name.startswith("text_encoder"):
        if class_name not in TEXT_ENCODERS:
            raise ModelError(f'The {name} of "{source}" is a {class_name}; supported: {", ".join(TEXT_ENCODERS)}.')
        return TEXT_ENCODERS[class_name]
    if name == "scheduler":
        if not hasattr(diffusers, class_name):
            raise ModelError(f'diffusers {diffusers.__version__} has no scheduler "{class_name}" ("{source}").')
        return getattr(diffusers, class_name)
    return None


def _component(loader: type, source: str, subfolder: str | None, **options: Any) -> Any:
    what = f"the {subfolder}" if subfolder else f"a {loader.__name__}"
    is_module = issubclass(loader, torch.nn.Module)
    if is_module:
        options |= {"use_safetensors": True, "output_loading_info": True}
        if loader in TEXT_ENCODERS.values():
            options["dtype"] = options.pop("torch_dtype")
    options = {key: value for key, value in options.items() if value is not None}
    with load_errors(what, source):
        loaded = loader.from_pretrained(source, subfolder=subfolder or "", **options)
    if not is_module:
        return loaded
    module, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        # diffusers and transformers would carry on with random numbers in their place.
        raise ModelError(
            f'The weights of {what} of "{source}" lack {len(missing)} tensors, such as "{missing[0]}". '
            "They do not belong to its config.json: download or export the folder again."
        )
    return module


def _from_file(
    path: Path,
    replacements: dict[str, Any],
    vae: str | Path | None,
    config: str | Path | None,
    torch_dtype: torch.dtype,
) -> tuple[dict[str, Any], dict[str, Any]]:
    with single_file.config_folder(path, config) as folder:
        index = read_index(str(folder))
        if vae is not None:
            replacements["vae"] = load_vae(vae, torch_dtype, config=str(folder))
        class_name = index["_class_name"]
        return index, single_file.load_modules(path, class_name, folder, replacements, torch_dtype)


def _folder_hint(folder: Path) -> str:
    if (folder / LORA_FILE).is_file():
        return "It holds a LoRA: give the base model here, and the LoRA to evaluation."
    if (folder / "unet").is_dir() or (folder / "config.json").is_file():
        return "It holds a single network: give it as unet_init (or vae), and a whole model here."
    return f"It holds: {', '.join(sorted(entry.name for entry in folder.iterdir())[:8]) or 'nothing'}."


def _present(modules: dict[str, Any], *names: str) -> list[Any]:
    return [modules[name] for name in names if modules.get(name) is not None]
