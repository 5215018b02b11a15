"""Options that several commands share: one help text each, and groups of them that become a command's options."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "A hub id, folder, .safetensors file, LoRA, or training run such as runs/demo. dpo=runs/demo names it dpo."
SCORERS_HELP = (
    "Scorers: pickscore,hpsv2.1,oracle. Weights of your own: pickscore=FOLDER. Code of your own: my_judges.py:Mine."
)

PromptFile = Annotated[Path | None, typer.Option(help="A text file with one prompt a line, or a table (csv, parquet).")]
PromptTexts = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")]
Seeds = Annotated[str, typer.Option(help="Seeds of every prompt: 0, 0,3,7 or 0-3 (both ends included).")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first so many.")]
PairLimit = Annotated[int | None, typer.Option(min=1, help="Use only the first so many pairs.")]
Root = Annotated[
    Path | None, typer.Option(help="Pictures that data names, or links lead to, may lie in this folder too.")
]
PairSplit = Annotated[str, typer.Option(help="Split of the pairs.")]
Scorers = Annotated[list[str] | None, typer.Option("--with", help=SCORERS_HELP)]
Base = Annotated[str | None, typer.Option(help="The model that LoRAs and UNets go on, if not the one they name.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.")]
_Pixels = Annotated[int | None, typer.Option(help="Pixels; by default what the model was made for.")]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large pictures are, and how many are drawn at a time."""

    height: _Pixels = None
    width: _Pixels = None
    batch_size: Annotated[int, typer.Option(help="Pictures at a time; does not change them.")] = 8


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a picture is drawn."""

    steps: Annotated[int, typer.Option(help="Denoising steps, with the model's own scheduler.")] = 30
    guidance_scale: Annotated[
        float, typer.Option(help="7.5 is usual for SD1.5, 5.0 for SDXL, 4.0 for Qwen-Image; 1 is none (of Z-Image, 0).")
    ] = 5.0
    negative_prompt: Annotated[str, typer.Option(help="What the pictures should not show.")] = ""
    long_prompts: Annotated[
        str, typer.Option(help="truncate, or chunk: CLIP reads prompts as a whole, 75 tokens at a time (SD1.5, SDXL).")
    ] = "truncate"

    def settings(self, size: Size):
        """Return the `SamplingSettings` that both groups say."""
        from diffalign.evaluation import SamplingSettings

        given = {name: value for name, value in vars(self).items() if name != "steps"}
        return SamplingSettings(num_inference_steps=self.steps, **given, **vars(size))


@dataclass(frozen=True, kw_only=True)
class NegativeBranch:
    """Diffusion-NPO: what draws the unconditional branch of guidance."""

    negative_lora: Annotated[
        str | None,
        typer.Option(help="Diffusion-NPO: a LoRA, UNet or run that draws the unconditional branch of guidance."),
    ] = None
    negative_scale: Annotated[float, typer.Option(help="How much of --negative-lora is in that branch.")] = 1.0
    policy_scale: Annotated[float, typer.Option(help="How much of MODEL's own training is in that branch.")] = 1.0

    def network(self):
        """Return the `Negative` that is asked for, or None."""
        from diffalign.jobs.drawing.negative import Negative

        return Negative.of(self.negative_lora, self.negative_scale, self.policy_scale)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where networks run, and in what precision."""

    dtype: Dtype = "auto"
    device: Device = "auto"

    @property
    def arguments(self) -> dict[str, str]:
        """What jobs call the two."""
        return {"torch_dtype": self.dtype, "device": self.device}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with its groups spread out.

    A parameter annotated with a dataclass becomes one option a field, at its place in --help; the command is given the
    dataclass. So options that belong together are declared once, and checked or turned into settings where they are.
    """
    parameters, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name] = parameter.annotation
        for field in fields(parameter.annotation):
            kind, default = inspect.Parameter.KEYWORD_ONLY, field.default
            parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=field.type))

    @functools.wraps(command)
    def run(**given) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
