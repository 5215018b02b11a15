"""`diffalign demo`: the main job at a size for a CPU, through the code that runs SDXL.

Train on preference pairs, draw held-out prompts with the base and the aligned model from the same noise, score the
pictures with the oracle and the tiny reward models, and leave a grid, a report and a summary.
"""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

import reward_models
from diffalign import config as configuration
from diffalign.backbones import inspection, loading
from diffalign.backbones.export import load_adapter_into
from diffalign.backbones.families import denoiser_of
from diffalign.config import Config
from diffalign.evaluation import (
    Comparison,
    Manifest,
    SamplingSettings,
    attribute_table,
    generate_to,
    grid_of,
    prompt_plan,
    save_grid,
    score_table,
    write_report,
)
from diffalign.jobs.drawing.prompts import read_prompts
from diffalign.jobs.training import model_card
from diffalign.jobs.training.train import train, versions
from diffalign.places import local
from diffalign.shapes.oracle import Oracle

SAMPLING = SamplingSettings(num_inference_steps=20, guidance_scale=2.5, batch_size=64)
N_PROMPTS = 256
TINY_SCORERS = {"pickscore": Path("assets/tiny-pickscore"), "hpsv2": Path("assets/tiny-hpsv2")}
RECIPES = {"sdxl": Path("tiny/dpo"), "sd3": Path("tiny-sd3/dpo")}  # by the embedded model


def demo(
    config_file: Path, output_dir: Path, prompts: Path, seed: int, console: Console, *, overwrite: bool = False
) -> dict[str, Any]:
    """Run the demo, or go on with one that was interrupted, and return its summary."""
    started = time.perf_counter()
    changes = [f"train.output_dir={output_dir}", f"train.seed={seed}"]
    changes += [] if overwrite else ["train.resume_from_checkpoint=latest"]
    config = configuration.load(config_file, changes)
    console.rule("1/3  Align the base model with preference pairs")
    metrics = train(config, console, overwrite=overwrite)
    console.rule("2/3  Draw held-out prompts with both models")
    base, aligned = draw(config, output_dir, read_prompts(prompts, N_PROMPTS), seed)
    console.rule("3/3  Score and show")
    comparison = compare(base, aligned)
    extra = {
        "pairs_per_second": metrics.get("pairs_per_second"),
        "training": metrics,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": versions(),
    }
    images = {"base": base.images, "aligned": aligned.images}
    present(config, comparison, images, output_dir, extra, command=f"diffalign demo --config {config_file}")
    for scorer in comparison.results:
        console.print(f"[bold]{scorer}[/]: {comparison.describe(scorer)}")
    console.print(
        f"\nLook at {output_dir}/grid.png and {output_dir}/report.html; numbers in {output_dir}/summary.json."
    )
    return comparison.summary(extra)


def draw(config: Config, output_dir: Path, prompts: list[str], seed: int) -> tuple[Manifest, Manifest]:
    """Draw every prompt with the base model and with what was trained, from the same noise."""
    backbone = loading.load(config.model.pretrained_model_name_or_path)
    ids, texts, seeds = prompt_plan(prompts, seed=1_000_000 * (seed + 1))
    pipeline = backbone.pipeline()
    drawn = []
    for name in ("base", "aligned"):
        if name == "aligned":
            pipeline = load_adapter_into(pipeline, output_dir)
            backbone.denoiser = denoiser_of(
                pipeline
            )  # another module after full fine-tuning: the fingerprint must be its own
        fingerprint = backbone.denoiser_fingerprint()
        identity, folder = f"{name} {fingerprint}", output_dir / "images" / f"{name}-{fingerprint[:8]}"
        drawn.append(generate_to(folder, pipeline, texts, seeds, SAMPLING, identity=identity, prompt_ids=ids))
    return drawn[0], drawn[1]


def compare(base: Manifest, aligned: Manifest) -> Comparison:
    """Score both sets of pictures with the oracle and the tiny reward models."""
    oracle = Oracle()
    scorers = [oracle, *(reward_models.load(name, local(folder)) for name, folder in TINY_SCORERS.items())]
    models = {"base": base, "aligned": aligned}
    scores = [score_table(m.paths, m.prompts, scorers, model=name, **m.columns) for name, m in models.items()]
    attributes = [attribute_table(m.paths, m.prompts, [oracle], model=name, **m.columns) for name, m in models.items()]
    return Comparison.from_tables(
        *scores, base_attributes=attributes[0], aligned_attributes=attributes[1], settings=base.settings
    )


def present(
    config: Config,
    comparison: Comparison,
    images: dict[str, Any],
    output_dir: Path,
    extra: dict[str, Any],
    command: str,
) -> None:
    """Write scores, summary, grid, report, and the model card with its scores."""
    comparison.write(output_dir, extra)
    title = f"{config.objective_name.upper()} on the embedded world"
    save_grid(grid_of(comparison, images, count=6, title=title), output_dir / "grid.png")
    write_report(
        output_dir / "report.html",
        comparison,
        images,
        metrics=output_dir / "metrics.jsonl",
        config=config.model_dump(mode="json"),
        command=command,
        title=title,
    )
    rows = ["| scorer | base | aligned | win rate | 95 % interval |", "|---|---|---|---|---|"]
    for name, r in comparison.results.items():
        rows.append(
            f"| {name} | {r.base:.4g} | {r.aligned:.4g} | {r.win_rate:.3f} | {r.ci_low:.3f} to {r.ci_high:.3f} |"
        )
    card = model_card.render(
        config,
        inspection.family_at(config.model.pretrained_model_name_or_path).family,
        extra["training"],
        "\n".join(rows),
    )
    (output_dir / "README.md").write_text(card, encoding="utf8")
