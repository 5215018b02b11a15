"""The model card of a run: what was trained on what, how, and how to use it."""

from pathlib import Path

from diffalign import config as configuration
from diffalign.backbones.families import BY_NAME
from diffalign.config import Config

SHOWN = ("loss", "implicit_accuracy", "margin", "chosen_drift", "rejected_drift", "pairs_per_second")


def render(config: Config, family: str, metrics: dict[str, float], scores: str = "") -> str:
    """Return the README.md of a trained model, with the front matter that the hub reads."""
    base, lora = config.model.pretrained_model_name_or_path, config.model.tune == "lora"
    method = config.objective_name.rpartition(":")[2]  # of a plug-in the class: its address means nothing elsewhere
    data = config.data
    named = data.dataset_name or Path(data.train_data_dir or data.prompts_file).name
    learnt_from = f"{'its own pictures for the prompts' if data.prompts_file else 'the preference pairs'} of {named}"
    header = ["---", f"base_model: {base}", "library_name: diffusers", "pipeline_tag: text-to-image"]
    header += [f"datasets: [{config.data.dataset_name}]"] if config.data.dataset_name else []
    header += [f"tags: [text-to-image, diffusers, {'lora, ' if lora else ''}{method}, diffalign]", "---"]
    rows = [f"| {name} | {metrics[name]:.4g} |" for name in SHOWN if name in metrics]
    return "\n".join(
        [
            *header,
            "",
            f"# {Path(config.train.output_dir).name}",
            "",
            f"{'A LoRA for' if lora else 'A fine-tuned denoiser of'} `{base}`, aligned with {learnt_from} "
            f"by {method.upper()} in {config.train.max_train_steps} steps.",
            "",
            "```python",
            *_usage(base, family, lora),
            "```",
            "",
            *([scores, ""] if scores else []),
            "| at the end of training | |",
            "|---|---|",
            *rows,
            "",
            "## Configuration",
            "",
            "```yaml",
            configuration.dump(config).rstrip(),
            "```",
            "",
        ]
    )


def _usage(base: str, family: str, lora: bool) -> list[str]:
    known = BY_NAME[family]
    lines = ["import diffusers", "", f'pipe = diffusers.{known.pipeline_class.__name__}.from_pretrained("{base}")']
    if lora:
        return [*lines, 'pipe.load_lora_weights("path/to/this/folder")']
    name, loader = known.denoiser_name, f"diffusers.{known.denoiser_class.__name__}"
    return [*lines, f'pipe.{name} = {loader}.from_pretrained("path/to/this/folder", subfolder="{name}")']
