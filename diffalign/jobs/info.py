"""`diffalign info`: versions, devices, optional parts and cache folders."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants as hub
from rich.console import Console
from rich.text import Text

import diffalign
from diffalign.jobs.sheets import sheet

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "datasets", "open_clip_torch")
# What an optional package is for, and how to get it.
OPTIONAL = {
    "xformers": ("attention kernels", "diffalign[xformers]"),
    "bitsandbytes": ("optimizer.name adamw_8bit", "diffalign[gpu]"),
    "torchao": ("low-precision frozen passes", "diffalign[gpu]"),
    "wandb": ("logging.report_to wandb", "diffalign[wandb]"),
    "ipywidgets": ("progress bars in notebooks", "diffalign[notebook]"),
}


def info(console: Console) -> dict[str, dict[str, str]]:
    """Print and return versions, devices, optional parts and cache folders: what a bug report should hold."""
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Optional parts": {name: _optional(name, *about) for name, about in OPTIONAL.items()},
        "Hub": _hub(),
    }
    for title, entries in sections.items():
        table = sheet(title)
        for name, value in entries.items():
            table.add_row(name, Text(value))
        console.print(table)
    return sections


def _versions() -> dict[str, str]:
    found = {"diffalign": diffalign.__version__, "python": platform.python_version(), "system": platform.platform()}
    return found | {name: _installed(name) or "not installed" for name in PACKAGES}


def _devices() -> dict[str, str]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    entries = {"CPU": f"{platform.machine()}, {cpus} cores, {torch.get_num_threads()} torch threads"}
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return entries | {"CUDA": f"no device (torch is {built})", "bf16": "on the CPU only, slowly"}
    entries["CUDA"] = str(torch.version.cuda)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"sm_{device.major}{device.minor}"
        entries[f"cuda:{index}"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return entries | {"bf16": "yes" if has_bf16 else "no: use fp16 (train.mixed_precision) or float32"}


def _optional(name: str, purpose: str, extra: str) -> str:
    found = _installed(name)
    return f"{found}, for {purpose}" if found else f'not installed; for {purpose}: pip install "{extra}"'


def _hub() -> dict[str, str]:
    offline = "set: nothing is downloaded" if hub.HF_HUB_OFFLINE else "not set: models may be downloaded"
    free = _free(Path(hub.HF_HUB_CACHE))
    return {
        "HF_HUB_OFFLINE": offline,
        "models": f"{hub.HF_HUB_CACHE} ({free})",
        "latents": "data.cache_dir of a config",
    }


def _free(folder: Path) -> str:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**30:.0f} GiB free"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
