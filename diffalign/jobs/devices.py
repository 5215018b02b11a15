"""Where to compute, and in what precision."""

import os

import torch

from diffalign.errors import ModelError, suggestion

# How launchers (torchrun and accelerate, then those of MPI) say how many processes they started.
LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def launched_processes() -> int:
    """Return how many processes this one is launched with, itself included."""
    return max(1, *(int(os.environ.get(name) or 1) for name in LAUNCHED))


def together_on_cpus() -> bool:
    """Tell whether several processes were launched where there is no device for each, so that they share the CPUs.

    accelerate must be told: otherwise each of them would do the whole job alone, and all write into one folder.
    """
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return launched_processes() > 1 and (present is None or present.type == "mps")


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one.

    Raises:
        ModelError: the device is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ModelError(f'Device "{name}" cannot be used ({reason}). Use auto, cpu, cuda, cuda:1 or mps.') from None
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; "auto" is bfloat16 where the GPU computes in it, else float32.

    Raises:
        ModelError: the dtype is unknown.
    """
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    if name not in DTYPES:
        raise ModelError(f'Unknown dtype "{name}".{suggestion(name, DTYPES)} Use auto, {", ".join(DTYPES)}.')
    return DTYPES[name]
