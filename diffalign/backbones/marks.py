"""What files say of the noise schedule that their network was trained on, in tensors and headers as programs mark it.

ComfyUI's merges hold empty tensors named v_pred and ztsnr; modelspec.* is Stability AI's standard for headers, which
sd-scripts, OneTrainer and ComfyUI write; ss_* are sd-scripts' own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler

from diffalign.backbones.files import read_header
from diffalign.errors import ModelError

V, EPSILON = "v_prediction", "epsilon"
WORDS = {"v": V, "v_prediction": V, "vprediction": V, "vpred": V, "v_pred": V, "velocity": V}
WORDS |= {"epsilon": EPSILON, "eps": EPSILON, "noise": EPSILON}
SAID = ("modelspec.prediction_type", "prediction_type")
FLAGS_V = ("ss_v_parameterization", "v_pred", "v_parameterization")
FLAGS_ZERO = ("ss_zero_terminal_snr", "modelspec.zero_terminal_snr", "zero_terminal_snr", "ztsnr")
# How the names of models end that predict v, as in sd_v2_v, sd_v2_768_v and stable-diffusion-v2-768-v/lora.
NAMES = {"ss_base_model_version": "_v", "modelspec.architecture": "-v"}
EDM = ("edm_vpred.sigma_max", "edm_mean")  # marks of schedules of another kind


def schedule_hints(path: Path) -> dict[str, Any]:
    """Return prediction_type and zero_terminal_snr as far as the file of an SD or SDXL network, or its LoRA, says them.

    Raises:
        ModelError: it is marked as trained on a schedule that is not supported.
    """
    header = read_header(path)
    said: Mapping[str, str] = header.get("__metadata__", {})
    if mark := next((mark for mark in EDM if mark in header), None):
        raise ModelError(
            f'"{path}" is marked as trained on an EDM schedule ("{mark}"), which is not supported. Use a model that '
            "predicts epsilon or v on DDPM's."
        )
    hints: dict[str, Any] = {}
    if (kind := _prediction_type(header, said, path)) is not None:
        hints["prediction_type"] = kind
    if "ztsnr" in header or any(_true(said.get(flag)) for flag in FLAGS_ZERO):
        hints["zero_terminal_snr"] = True
    return hints


def scheduler_hints(folder: Path) -> dict[str, Any]:
    """Return the same as the scheduler of the pipeline in `folder` says it; nothing where there is none."""
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return {}
    config = DDIMScheduler.load_config(folder, subfolder="scheduler")  # of whichever class it is
    hints = {"prediction_type": config["prediction_type"]} if "prediction_type" in config else {}
    return hints | ({"zero_terminal_snr": True} if config.get("rescale_betas_zero_snr") else {})


def _prediction_type(header: Mapping[str, Any], said: Mapping[str, str], path: Path) -> str | None:
    """Return what is predicted; a tensor is put in on purpose, what headers say may be left from an ancestor."""
    if "v_pred" in header or any(_true(said.get(flag)) for flag in FLAGS_V):
        return V
    for key in SAID:
        if (word := said.get(key, "").strip().lower().replace("-", "_")) in WORDS:
            return WORDS[word]
        if word:
            raise ModelError(
                f'The header of "{path}" says {key} "{said[key]}"; epsilon and v are supported. If that is wrong, take '
                "the entry out of the file."
            )
    if any(said.get(key, "").removesuffix("/lora").endswith(end) for key, end in NAMES.items()):
        return V
    return None


def _true(value: str | None) -> bool:
    return value is not None and value.strip().lower() in ("true", "1", "yes")
