"""`diffalign export`: the weights of a run or of one of its checkpoints, in the layout another program loads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from diffalign import config as configuration
from diffalign.backbones import export, inspection, loading
from diffalign.backbones.families import DENOISERS
from diffalign.backbones.files import LORA_FILE, read_header
from diffalign.config import Config
from diffalign.errors import ConfigError, ModelError, suggestion
from diffalign.jobs.devices import pick_dtype
from diffalign.jobs.drawing import models
from diffalign.jobs.drawing.checkpoints import is_checkpoint
from diffalign.jobs.training import meta_model, networks
from diffalign.training import checkpoint, checkpoints

FORMATS = {
    "diffusers": "what diffusers' pipelines take: a LoRA, or unet/ (transformer/) of a run that tuned all weights",
    "kohya": "one LoRA file for kohya's sd-scripts and A1111; ComfyUI loads it too",
    "comfy": "one LoRA file for ComfyUI, with the names of the original network (of UNets kohya's)",
    "unet": "unet/ or transformer/ with all weights, a LoRA merged into those of its base",
}
ONE_FILE = ("kohya", "comfy")
FOLDER = "export"  # of a run
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    """Say which weights are meant: those a run ended with, or those of a checkpoint."""

    run: Path
    place: Path  # the run itself, or the folder of the checkpoint
    config: Config

    @classmethod
    def find(cls, place: Path, base: str | None = None) -> "Trained":
        """Read what `place` is; `base` is where its base model lies now, if it has moved.

        Raises:
            ModelError: it is neither a finished run nor a checkpoint of one.
        """
        place = place.expanduser()
        run = models.run_of(place)
        if run is None or (place != run and not is_checkpoint(place)):
            raise ModelError(
                f'"{place}" is no training run and no checkpoint of one. Give runs/NAME, or its checkpoint-N.'
            )
        moved = [] if base is None else [f"model.pretrained_model_name_or_path={base}"]
        config = configuration.load(run / models.RUN_FILE, moved)
        if place != run:
            checkpoints.require_whole(place)
        weights = (LORA_FILE,) if config.model.tune == "lora" else DENOISERS
        if place == run and not any((run / name).exists() for name in weights):
            steps = ", ".join(path.name for path in checkpoints.folders(run)) or "none yet"
            raise ModelError(f'The run "{run}" has not finished. Name one of its checkpoints ({steps}).')
        return cls(run, place, config)

    @property
    def is_lora(self) -> bool:
        """Tell whether adapters were trained, and not all weights."""
        return self.config.model.tune == "lora"

    @property
    def name(self) -> str:
        """Return a name for files: that of the run, with the step of a checkpoint."""
        run = self.run.resolve().name
        return run if self.place == self.run else f"{run}-{self.step}"

    @property
    def step(self) -> int:
        """Return how many optimizer steps made these weights."""
        if self.place == self.run:
            return self.config.train.max_train_steps
        return checkpoint.steps_of(self.place)

    def weights(self, denoiser: nn.Module, shape: str = "from its config") -> dict[str, Tensor]:
        """Return the trained weights by the names of the parameters of `denoiser`: what the run's end exports or would.

        That is the moving average where the run keeps one. `shape` says where that of `denoiser` is from.
        """
        names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        keys = export.lora_keys(denoiser) if self.is_lora else None
        file = checkpoint.WeightsFile(LORA_FILE, keys) if self.is_lora else checkpoint.WeightsFile()
        found = file.read(self.place)
        if self.place != self.run and self.config.optimizer.use_ema:
            found = dict(zip(names, checkpoint.averages(self.place), strict=True))
        if found.keys() != set(names):
            raise ModelError(
                f"{self.place} holds other weights than {self.run / models.RUN_FILE} says, on the base model "
                f'"{self.config.model.pretrained_model_name_or_path}" ({shape}). Say with --base where that is.'
            )
        return found


def run(place: Path, form: str, out: Path | None, dtype: str, console: Console, *, base: str | None = None) -> Path:
    """Export the weights at `place` and return what was written.

    Args:
        place: a finished run, or the checkpoint of one.
        form: one of FORMATS.
        out: the folder to write into (kohya, comfy: or the .safetensors file); None: export/ in the run.
        dtype: "float32" (as trained), "float16" or "bfloat16".
        base: the base model, if it is not where the run found it.

    Raises:
        ConfigError: an unknown format, or one that these weights do not have.
        ModelError: there is nothing to export.
    """
    if form not in FORMATS:
        raise ConfigError(f'Unknown --format "{form}".{suggestion(form, FORMATS)} Available: {", ".join(FORMATS)}.')
    stored = pick_dtype(dtype, CPU)
    trained = Trained.find(place, base)
    if form in ONE_FILE and not trained.is_lora:
        raise ConfigError(
            f'"{place}" tuned all weights, and {form}\'s layout is for LoRAs. Use --format unet, which diffusers '
            "loads. A whole checkpoint for other programs is made of a diffusers folder of the base with this unet/ in "
            "it, by diffusers' scripts/convert_diffusers_to_original_sdxl.py (or ..._original_stable_diffusion.py)."
        )
    folder = out or trained.run / FOLDER / ("final" if place == trained.run else trained.place.name)
    if form == "unet" or not trained.is_lora:
        written = _write_unet(trained, folder, stored)
    else:
        written = _write_lora(trained, form, folder, stored)
    console.print(f"{written}: {_usage(written, form, trained)}", markup=False, highlight=False, soft_wrap=True)
    return written


def _write_lora(trained: Trained, form: str, folder: Path, dtype: torch.dtype) -> Path:
    """Write the LoRA; the weights of the base are not needed for that, only its shape."""
    config = trained.config
    model = meta_model.read(config)
    denoiser, shape = model.denoiser, model.origin
    networks.add_adapters(config, denoiser)
    prediction_type = _prediction_type(trained)
    base = configuration.portable(config).model.pretrained_model_name_or_path
    metadata = {"objective": config.objective_name, "prediction_type": prediction_type, "training_steps": trained.step}
    given = {"state_dict": trained.weights(denoiser, shape), "dtype": dtype}
    if form == "diffusers":
        return export.save_lora(denoiser, folder, base, metadata, **given)
    file = folder if folder.suffix == ".safetensors" else folder / f"{trained.name}.safetensors"
    if form == "comfy" and not model.kind.layer_names(denoiser).comfy_is_kohya:
        return export.save_comfy_lora(denoiser, file, base, metadata, **given)
    return export.save_kohya_lora(denoiser, file, base, metadata, prediction_type=prediction_type, **given)


def _prediction_type(trained: Trained) -> str:
    """Return what the network predicts; LoRAs before 2026-12 do not say so."""
    file = trained.place / LORA_FILE
    said = read_header(file).get("__metadata__", {}).get("prediction_type") if file.is_file() else None
    return said or trained.config.model.prediction_type or "epsilon"


def _write_unet(trained: Trained, folder: Path, dtype: torch.dtype) -> Path:
    """Write all weights. They are merged in float32, whatever `dtype` they are written in."""
    if not trained.is_lora and trained.place == trained.run:
        family = inspection.family_at(trained.config.model.pretrained_model_name_or_path)
        return export.save_denoiser(loading.load_denoiser(trained.run, family, torch.float32), folder, dtype=dtype)
    model = models.Model(trained.name, models.Base.of(trained.config.model), str(trained.place))
    denoiser = models.load_base(model, torch.float32).denoiser
    if not trained.is_lora:
        return export.save_denoiser(denoiser, folder, state_dict=trained.weights(denoiser), dtype=dtype)
    networks.add_adapters(trained.config, denoiser)
    denoiser.load_state_dict(trained.weights(denoiser), strict=False)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return export.save_denoiser(denoiser, folder, dtype=dtype)


def _usage(written: Path, form: str, trained: Trained) -> str:
    """Say how to load what was written."""
    if form in ONE_FILE:
        return "for the folder models/loras of ComfyUI, models/Lora of A1111"
    family = inspection.family_at(trained.config.model.pretrained_model_name_or_path)
    if written.name == LORA_FILE:
        return "; ".join(family.lora_usage(str(written.parent)))
    return f'pipe.{written.name} = diffusers.{family.denoiser_class.__name__}.from_pretrained("{written}")'
