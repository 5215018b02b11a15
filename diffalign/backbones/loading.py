"""Load a backbone from a hub id, a diffusers folder or a single .safetensors file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn
from transformers import PreTrainedModel

from diffalign.backbones import base, marks, single_file
from diffalign.backbones.base import Backbone, present
from diffalign.backbones.denoiser_file import DenoiserFile
from diffalign.backbones.families import PIPELINES
from diffalign.backbones.files import check_weights, load_errors
from diffalign.backbones.inspection import check_trainable, denoiser_config, denoiser_file, located, read_index
from diffalign.errors import ModelError


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
    resolution: int | None = None,
) -> Backbone:
    """Load a text-to-image model on the CPU; each weight is read once, in `torch_dtype`.

    Args:
        pretrained_model_name_or_path: hub id, diffusers folder or single .safetensors file.
        vae: hub id, folder or file of a VAE to use instead, such as "madebyollin/sdxl-vae-fp16-fix".
        unet_init: hub id, folder or single .safetensors file of a UNet or transformer (or of a pipeline with one) to
            use instead of the model's own.
        revision: branch, tag or commit of a hub id.
        variant: "fp16" to read `*.fp16.safetensors`; does not apply to `vae` and `unet_init`.
        torch_dtype: dtype of all modules.
        prediction_type: "epsilon" or "v_prediction", where the scheduler's own, or what a file is marked with
            (see `marks`), is wrong or missing.
        zero_terminal_snr: rescale the schedule to end in pure noise (arXiv:2305.08891); needs v_prediction.
        config: for a single file only: the diffusers folder or hub id with its configs and tokenizers. By default the
            published ones of SD1.5 and SDXL base, which ship with this package.
        resolution: of the pictures to train on, in pixels: what cannot be trained so is refused before weights are
            read. None: nothing is trained.

    Raises:
        ModelError: the model is missing, broken, pickled, of an unsupported family, or does not fit these options.
    """
    source = located(pretrained_model_name_or_path)
    hints = _file_marks(Path(source)) | ({} if unet_init is None else denoiser_marks(Path(located(unet_init))))
    replacements: dict[str, Any] = {}
    if Path(source).is_file():
        index, modules = _from_file(Path(source), unet_init, vae, config, torch_dtype)
    else:
        if config is not None:
            raise ModelError(f'"config" describes a single .safetensors file, but "{source}" is not one. Drop it.')
        index = read_index(source, revision)
        family = PIPELINES[index["_class_name"]]
        if resolution is not None:
            check_trainable(source, family, resolution, revision)
        if vae is not None:
            replacements["vae"] = load_vae(vae, torch_dtype, config=source, loader=family.vae_class)
        if unet_init is not None:
            replacements[family.denoiser_name] = load_denoiser(unet_init, family, torch_dtype, source, revision)
        modules = _from_folder(source, index, replacements, revision, variant, torch_dtype)
    family = PIPELINES[index["_class_name"]]
    return family(
        denoiser=modules[family.denoiser_name],
        vae=modules["vae"],
        tokenizers=present(modules, base.TOKENIZERS),
        text_encoders=present(modules, base.TEXT_ENCODERS),
        scheduler=with_marks(modules["scheduler"], hints, prediction_type, zero_terminal_snr),
        source=source,
        options={key: value for key, value in index.items() if isinstance(value, bool)},
    )


def load_denoiser(
    source: str | Path,
    family: type[Backbone],
    torch_dtype: torch.dtype,
    pipeline: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Load a family's denoiser from its folder, a folder with `unet/` or `transformer/`, a hub id or a single file.

    A single file has no configuration: it must fit that of `pipeline`, a folder or a hub id at `revision`.

    Raises:
        ModelError: there is none, it is broken, lacks weights of its configuration, or is quantised.
    """
    if pipeline is not None and (file := denoiser_file(source)) is not None:
        return file.load(family, denoiser_config(pipeline, family, revision), f'"{pipeline}"', torch_dtype)
    source, name, loader = located(source), family.denoiser_name, family.denoiser_class
    folder = Path(source)
    if folder.exists():
        subfolder = name if (folder / name).is_dir() else None
        check_weights(folder / (subfolder or ""))
        return _component(loader, source, subfolder, torch_dtype=torch_dtype)
    try:
        return _component(loader, source, name, torch_dtype=torch_dtype)
    except ModelError as error:
        try:
            return _component(loader, source, None, torch_dtype=torch_dtype)
        except ModelError:
            raise error from None


def load_vae(
    source: str | Path, torch_dtype: torch.dtype, config: str | None = None, loader: type[nn.Module] = AutoencoderKL
) -> nn.Module:
    """Load a VAE from a VAE folder, a folder with `vae/`, a hub id or a single file shaped like `config`'s VAE."""
    source = located(source)
    path = Path(source)
    if path.is_file():
        return single_file.load_vae(path, config, torch_dtype)
    subfolder = "vae" if (path / "vae").is_dir() else None
    if path.exists():
        check_weights(path / (subfolder or ""))
    return _component(loader, source, subfolder, torch_dtype=torch_dtype)


def with_marks(
    scheduler: Any, hints: Mapping[str, Any], prediction_type: str | None = None, zero_terminal_snr: bool = False
) -> Any:
    """Return `scheduler` as the marks of a file ask for it, where it is not said; errors as of `with_schedule`."""
    prediction_type = prediction_type or hints.get("prediction_type")
    # As in ComfyUI, the mark of a zero terminal SNR counts beside that of v only.
    is_v = (prediction_type or scheduler.config.get("prediction_type")) == marks.V
    return with_schedule(scheduler, prediction_type, zero_terminal_snr or (is_v and "zero_terminal_snr" in hints))


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


def _file_marks(path: Path) -> dict[str, Any]:
    """Return what a single file says of its schedule; nothing of folders, which have a scheduler, and transformers."""
    if not path.is_file() or ((file := DenoiserFile.find(path)) is not None and file.kind.denoiser_name != "unet"):
        return {}
    return marks.schedule_hints(path)


def denoiser_marks(path: Path) -> dict[str, Any]:
    """Return the same of a denoiser to be put into another pipeline; a folder may be that of its own pipeline."""
    return marks.scheduler_hints(path) if (path / "unet").is_dir() else _file_marks(path)


def _from_folder(
    source: str,
    index: dict[str, Any],
    replacements: dict[str, Any],
    revision: str | None,
    variant: str | None,
    torch_dtype: torch.dtype,
) -> dict[str, Any]:
    modules = dict(replacements)
    family = PIPELINES[index["_class_name"]]
    names = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    missing = family.required - {*names, *modules}
    if missing:
        raise ModelError(
            f'The model_index.json of "{source}" names no {", ".join(sorted(missing))}. '
            "Refiners and partial pipelines cannot be trained here: use the base model."
        )
    for name in names:
        loader = _loader(family, name, index[name][1], source)
        if loader is None or name in modules:
            continue
        options: dict[str, Any] = {"revision": revision}
        if issubclass(loader, torch.nn.Module):
            options |= {"torch_dtype": torch_dtype, "variant": variant}
            if Path(source).is_dir():
                check_weights(Path(source) / name, variant)
        modules[name] = _component(loader, source, name, **options)
    return modules


def _loader(family: type[Backbone], name: str, class_name: str, source: str) -> type | None:
    """Return the class that loads the component `name`, or None for those that training has no use for."""
    if name in (family.denoiser_name, "vae"):
        return family.denoiser_class if name == family.denoiser_name else family.vae_class
    parts = {base.TOKENIZERS: family.tokenizer_classes, base.TEXT_ENCODERS: family.encoder_classes}
    for names, classes in parts.items():
        if name in names:
            # Of a tokenizer, transformers 4 wrote "Fast" behind what transformers 5 calls it.
            found = {part.__name__: part for part in classes}.get(class_name.removesuffix("Fast"))
            if found is None:
                known = ", ".join(part.__name__ for part in classes)
                raise ModelError(f'The {name} of "{source}" is a {class_name}; supported: {known}.')
            return found
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
        if issubclass(loader, PreTrainedModel):
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
    unet_init: str | Path | None,
    vae: str | Path | None,
    config: str | Path | None,
    torch_dtype: torch.dtype,
) -> tuple[dict[str, Any], dict[str, Any]]:
    with single_file.config_folder(path, config) as folder:
        index, replacements = read_index(str(folder)), {}
        if vae is not None:
            replacements["vae"] = load_vae(vae, torch_dtype, config=str(folder))
        if unet_init is not None:
            family = PIPELINES[index["_class_name"]]
            replacements["unet"] = load_denoiser(unet_init, family, torch_dtype, str(folder))
        class_name = index["_class_name"]
        return index, single_file.load_modules(path, class_name, folder, replacements, torch_dtype)
