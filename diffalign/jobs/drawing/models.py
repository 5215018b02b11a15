"""What a user may name as a model, and how it becomes a pipeline.

stabilityai/stable-diffusion-xl-base-1.0, assets/tiny-sdxl, model.safetensors    a whole model
runs/demo                            a training run: its config.yaml names the base model
runs/demo/checkpoint-300             the weights of a run at one step
lora.safetensors, lora/, unet/, ...  weights that go on a base model: the one that --base, their run or their file names
flux1-dev.safetensors                a transformer or UNet alone, which goes on the base model that --base names
dpo=runs/demo                        any of these, under a name of one's own
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import ValidationError

from diffalign.backbones import inspection, loading, peft_folders, single_file
from diffalign.backbones.base import Backbone
from diffalign.backbones.export import unload_adapters
from diffalign.backbones.families import DENOISERS, adapted, denoiser_of
from diffalign.backbones.files import read_header
from diffalign.backbones.lora_families import check_lora
from diffalign.config.sections import ModelSettings
from diffalign.errors import ConfigError, ModelError
from diffalign.jobs.devices import pick_device, pick_dtype
from diffalign.jobs.drawing import checkpoints
from diffalign.places import local
from diffalign.yaml_text import read_yaml

RUN_FILE = "config.yaml"


@dataclass(frozen=True)
class Base:
    """Say which whole model is meant; the fields are the arguments of `backbones.load`."""

    source: str
    vae: str | None = None
    unet_init: str | None = None
    revision: str | None = None
    variant: str | None = None
    prediction_type: str | None = None
    zero_terminal_snr: bool = False

    @classmethod
    def of(cls, settings: ModelSettings) -> Self:
        """Return the model a run was trained from."""
        return cls(
            settings.pretrained_model_name_or_path,
            settings.pretrained_vae_model_name_or_path,
            settings.unet_init,
            settings.revision,
            settings.variant,
            settings.prediction_type,
            settings.zero_terminal_snr,
        )


@dataclass(frozen=True)
class Model:
    """Say what is to be loaded; nothing has been read but a few headers."""

    name: str  # short, for columns and file names
    base: Base
    weights: str | None = None  # what goes on the base; None: nothing


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """Hold a pipeline that is ready to draw."""

    name: str
    backbone: Backbone  # of the base; its denoiser may have been replaced in `pipeline`
    pipeline: DiffusionPipeline
    note: str = ""  # what else shapes its pictures, besides the tensors in `pipeline`

    @cached_property
    def identity(self) -> str:
        """Return the name, the dtype, a hash of everything in the pipeline that shapes a picture, and the note."""
        pipeline, denoiser = self.pipeline, denoiser_of(self.pipeline)
        whole = type(self.backbone).over(pipeline, self.backbone.source)
        # A LoRA's alpha is no tensor, so the fingerprints do not see it.
        networks = adapted(pipeline) or [denoiser]
        scales = [part.scaling for net in networks for part in net.modules() if isinstance(part, BaseTunerLayer)]
        parts = f"{whole.fingerprint()} {whole.denoiser_fingerprint()} {scales}"
        dtype = str(pipeline.dtype).removeprefix("torch.")
        return f"{self.name} ({dtype}, weights {hashlib.sha256(parts.encode()).hexdigest()[:16]}){self.note}"


def load_pipeline(spec: str, base: str | None = None, torch_dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load what `spec` names; see the head of this file.

    Args:
        spec: a model, a run, or weights that go on a base.
        base: the base model of weights, instead of the one they name.
        torch_dtype: "auto" (bfloat16 on GPUs that have it, else float32), "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ModelError: there is nothing of the kind, or it cannot be loaded.
    """
    return ModelLoader(torch_dtype, device).load(resolve([spec], base)[0])


class ModelLoader:
    """Load models one after another; a base that several have in common is loaded once."""

    def __init__(self, torch_dtype: str = "auto", device: str = "auto"):
        """Check device and dtype; nothing is loaded yet."""
        self.device = pick_device(device)
        self.torch_dtype = pick_dtype(torch_dtype, self.device)
        self._base: Base | None = None
        self._backbone: Backbone | None = None
        self._pipeline: DiffusionPipeline | None = None

    def load(self, model: Model) -> LoadedModel:
        """Return the model; the one returned before must not be used any more."""
        if self._pipeline is not None:
            unload_adapters(self._pipeline)  # leaves the base as it was
        self._pipeline = None
        _check_fits(model)
        backbone = self._loaded_base(model)
        self._pipeline = pipeline = backbone.pipeline()
        if model.weights is not None:
            pipeline = checkpoints.load_weights(pipeline, model.weights)
        denoiser_of(pipeline).eval()
        return LoadedModel(model.name, backbone, pipeline)

    def _loaded_base(self, model: Model) -> Backbone:
        if self._backbone is None or model.base != self._base:
            self._backbone = None  # frees the memory first
            self._backbone = load_base(model, self.torch_dtype).to(self.device)
            self._base = model.base
        return self._backbone


def resolve(specs: Sequence[str], base: str | None = None, *, base_is_used: bool = False) -> list[Model]:
    """Say what each name on the command line stands for, under names that differ.

    base_is_used: by something besides these models, so that they may all be whole models.

    Raises:
        ModelError: a folder that holds no model, weights without a base, a model given twice, a base without a use.
    """
    models = [_resolve(*split_name(spec), base) for spec in specs]
    if base is not None and not base_is_used and all(model.weights is None for model in models):
        raise ModelError(
            f'--base "{base}" has no effect: {", ".join(model.name for model in models)} '
            f"{'is a whole model' if len(models) == 1 else 'are whole models'}. Leave it out."
        )
    taken = [model.name for model in models]
    named = []
    for model, spec in zip(models, specs, strict=True):
        clash = taken.count(model.name) > 1 and split_name(spec)[0] is None
        named.append(replace(model, name=spec) if clash else model)
    names = [model.name for model in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ModelError(f'"{twice[0]}" is given twice. Leave one out, or name them: first={twice[0]}.')
    return named


def base_of(model: Model) -> Model:
    """Return the base model that the weights of `model` go on."""
    return Model("base", model.base)


def split_name(spec: str) -> tuple[str | None, str]:
    """Split "dpo=runs/demo" into name and path; what exists on disk is a path without a name."""
    name, sign, rest = spec.partition("=")
    is_named = sign and rest and name and "/" not in name and not Path(spec).exists()
    return (name, rest) if is_named else (None, spec)


def _resolve(name: str | None, spec: str, base: str | None) -> Model:
    weights = inspection.located(spec)
    path = Path(weights)
    name = name or _short_name(path)
    if _is_whole_model(path, weights, base):
        return Model(name, Base(weights))
    run = run_of(path)
    if path.is_dir():
        _require_weights(path, is_run=run == path)
    try:
        found = Base.of(_run_settings(run)) if run else None
    except ModelError:
        if base is None:
            raise
        found = None  # another program's config.yaml
    if base is not None:
        found = replace(found or Base(base), source=base, revision=None, variant=None)
    return Model(name, found or Base(_base_in_file(path, spec)), weights)


def _short_name(path: Path) -> str:
    """Return the last part of a path or hub id, with the run's name before a part that says nothing by itself."""
    own = path.stem if path.suffix == ".safetensors" else path.name or str(path.resolve().name)
    unsaid = (*DENOISERS, "pytorch_lora_weights")
    is_general = own in unsaid or own.startswith("checkpoint-")
    if not is_general or path.parent.name in ("", "."):
        return own
    return path.parent.name if own in unsaid else f"{path.parent.name}/{own}"


def _is_whole_model(path: Path, spec: str, base: str | None) -> bool:
    if path.is_dir():
        return (path / "model_index.json").is_file()
    if path.is_file():
        is_part = path.suffix == ".safetensors" and (
            any("lora" in key for key in read_header(path)) or single_file.is_denoiser(path)
        )
        return not is_part
    if base is None or spec == base:
        return True
    try:  # weights on the hub, such as mhdang/dpo-sdxl-text2image-v1, have no index of a pipeline
        inspection.read_index(spec)
    except ModelError:
        return False
    return True


def run_of(path: Path) -> Path | None:
    """Return the training run that `path` is or lies in."""
    return next((folder for folder in (path, *path.parents[:2]) if (folder / RUN_FILE).is_file()), None)


def _run_settings(run: Path) -> ModelSettings:
    file = run / RUN_FILE
    try:
        # Only this section, so that a run of another version stays readable.
        content = read_yaml(file)
        return ModelSettings.model_validate(content["model"])
    except (OSError, ConfigError, ValidationError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{file} is not the configuration of a training run ({reason}). Give the base model with --base."
        ) from error


def _require_weights(folder: Path, is_run: bool) -> None:
    if any(folder.glob("*.safetensors")) or any((folder / name).is_dir() for name in DENOISERS):
        return
    if is_run:
        steps = sorted(path.name for path in folder.glob("checkpoint-*")) or ["none yet"]
        raise ModelError(
            f'The run "{folder}" has no exported weights: it has not finished. Continue it with --resume latest, or '
            f"name a checkpoint of it ({', '.join(steps)})."
        )
    held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ModelError(
        f'"{folder}" holds no model: expected model_index.json (a pipeline), unet/, transformer/, a LoRA, or a '
        f"finished training run; it holds {held}."
    )


def _base_in_file(path: Path, spec: str) -> str:
    """Return the base model that the LoRA at `path` names, as those of diffalign do."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) if path.is_dir() else []
    named = [read_header(file).get("__metadata__", {}).get("base_model") for file in files]
    found = next((name for name in named if name), None) or peft_folders.base_named(path)
    if found is None:
        file = inspection.denoiser_file(path) if path.is_file() and single_file.is_denoiser(path) else None
        known = "stabilityai/stable-diffusion-xl-base-1.0" if file is None else file.pipeline
        raise ModelError(
            f'"{spec}" is a LoRA or {"a UNet" if file is None else f"a {file.what}"} and does not say which model it '
            f"belongs on. Give that model, e.g. --base {known}."
        )
    return found


def load_base(model: Model, torch_dtype: torch.dtype) -> Backbone:
    """Return what `model.base` names, on the CPU; its weights are not read."""
    options = asdict(model.base)
    source = options.pop("source")
    try:
        return loading.load(source, torch_dtype=torch_dtype, **options)
    except ModelError as error:
        raise ModelError(f"{error}{_hint(model, source)}") from error


def _check_fits(model: Model) -> None:
    """Refuse a LoRA of another kind of network than its base has, or its like in one file, before the base is read."""
    source = Path(inspection.located(model.base.source))
    if model.weights is None or not (source / "model_index.json").is_file():
        return
    place = Path(model.weights)
    if place.is_file() and single_file.is_denoiser(place):
        return inspection.check_denoiser(inspection.denoiser_file(place), str(source))
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        check_lora(file, inspection.read_index(str(source))["_class_name"])


def _hint(model: Model, source: str) -> str:
    """Say what may be meant by a model that is not on this machine."""
    path = local(source)
    if path.exists():
        return ""
    if model.weights is not None:
        return (
            f' "{model.weights}" was trained on "{source}": run this where that path is right, or say with --base '
            "where the model is now."
        )
    return " If it is a LoRA or a UNet on the hub, give its base model with --base."
