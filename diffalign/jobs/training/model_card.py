"""The model card of a run: what was trained on what, how, and how to use it. It names no folder of this machine."""

import re
from pathlib import Path
from typing import Any

from diffalign import config as configuration
from diffalign.backbones.families import BY_NAME
from diffalign.config import Config
from diffalign.places import find, is_hub_id
from diffalign.yaml_text import dump_yaml

SEPARATOR = re.compile(r"[/\\]")
SHOWN = ("loss", "implicit_accuracy", "margin", "chosen_drift", "rejected_drift", "pairs_per_second")
# What says nothing about the result: sections, and keys.
UNTOLD = {"validation", "logging"}
UNTOLD_KEYS = {
    *("output_dir", "cache_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"),
    *("push_to_hub", "hub_model_id", "hub_private", "export_kohya"),
}


def render(
    config: Config,
    family: str,
    metrics: dict[str, float],
    scores: str = "",
    *,
    repo: str | None = None,
    pipeline: str | None = None,
    processes: int = 1,
) -> str:
    """Return the README.md of a trained model, with the front matter that the hub reads.

    Args:
        config: of the run.
        family: of the model, a name of `families.BY_NAME`.
        metrics: of the last step.
        scores: a table to show.
        repo: where the model will be on the hub.
        pipeline: the class in diffusers that draws with it, the family's first if None.
        processes: how many trained it.
    """
    base, lora = config.model.pretrained_model_name_or_path, config.model.tune == "lora"
    data = config.data
    named = public(data.dataset_name) if data.dataset_name else Path(data.train_data_dir or data.prompts_file).name
    learnt_from = f"{'its own pictures for the prompts' if data.prompts_file else 'the preference pairs'} of {named}"
    rows = [f"| {name} | {metrics[name]:.4g} |" for name in SHOWN if name in metrics]
    return "\n".join(
        [
            *_front_matter(config),
            "",
            f"# {repo.rpartition('/')[2] if repo else Path(config.train.output_dir).name}",
            "",
            f"{'A LoRA for' if lora else 'Fine-tuned weights of'} `{public(base)}`, aligned with {learnt_from} "
            f"by {method_of(config).upper()} in {config.train.max_train_steps} steps.",
            "",
            *_picture(Path(config.train.output_dir)),
            "```python",
            *_usage(public(base), family, lora, repo or "path/to/this/folder", pipeline),
            "```",
            "",
            *([scores, ""] if scores else []),
            "| at the end of training | |",
            "|---|---|",
            *rows,
            "",
            "## Settings",
            "",
            "What differs from the defaults of [diffalign](https://github.com/diffalign/diffalign). Saved as run.yaml, "
            "with paths of your own, it trains this model again:",
            "",
            "```yaml",
            dump_yaml(settings(config)).rstrip(),
            "```",
            "",
            "```bash",
            f"{f'accelerate launch --num_processes {processes} -m ' if processes > 1 else ''}diffalign train run.yaml",
            "```",
            "",
        ]
    )


def method_of(config: Config) -> str:
    """Return the name of the objective; of a plug-in its class, since its address means nothing elsewhere."""
    return config.objective_name.rpartition(":")[2]


def settings(config: Config) -> dict[str, dict[str, Any]]:
    """Return the settings that differ from the defaults and shape the result; what is local is given by its name."""
    told = {
        section: {key: public(value) for key, value in keys.items() if key not in UNTOLD_KEYS}
        for section, keys in configuration.changed(config).items()
        if section not in UNTOLD
    }
    return {section: keys for section, keys in told.items() if keys}


def public(value: Any) -> Any:
    """Return a value with every path in it cut down to its last part; hub ids and all else stay as they are."""
    if isinstance(value, list):
        return [public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    whole = find(value) is not None and not is_hub_id(value)
    return _last(value) if whole else ",".join(map(_public, value.split(",")))


def _public(text: str) -> str:
    """Return PATH or NAME=PATH without the folders."""
    name, sign, place = text.partition("=")
    if not sign or SEPARATOR.search(name):
        name, sign, place = "", "", text
    return name + sign + (_last(place) if SEPARATOR.search(place) and not is_hub_id(place) else place)


def _last(path: str) -> str:
    return SEPARATOR.split(path.rstrip("/\\"))[-1]


def _front_matter(config: Config) -> list[str]:
    base, data = config.model.pretrained_model_name_or_path, config.data.dataset_name
    tags = ["text-to-image", "diffusers", *(["lora"] if config.model.tune == "lora" else [])]
    return [
        "---",
        *([f"base_model: {base}"] if is_hub_id(base) else []),
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        *([f"datasets: [{data}]"] if is_hub_id(data) else []),
        f"tags: [{', '.join([*tags, method_of(config), 'diffalign'])}]",
        "---",
    ]


def _picture(output_dir: Path) -> list[str]:
    """Return the last grid that was drawn while training, if there are any."""
    grids = sorted((output_dir / "validation").glob("step-*.png"))
    return [f"![base and aligned, drawn from the same noise](validation/{grids[-1].name})", ""] if grids else []


def _usage(base: str, family: str, lora: bool, place: str, pipeline: str | None) -> list[str]:
    known = BY_NAME[family]
    drawer = pipeline or known.pipeline_class.__name__
    lines = ["import diffusers", "", f'pipe = diffusers.{drawer}.from_pretrained("{base}")']
    if lora:
        return [*lines, *known.lora_usage(place)]
    name, loader = known.denoiser_name, f"diffusers.{known.denoiser_class.__name__}"
    return [*lines, f'pipe.{name} = {loader}.from_pretrained("{place}", subfolder="{name}")']
