"""`diffalign score` against the loop of the published packages, one image at a time, on the embedded world.

The loops do what the official functions do for every image: PickScore's README opens the file, calls the processor on
the image and on the prompt, both towers and `.item()`; `hpsv2.score` opens the file again, transforms, tokenizes, runs
the whole model and reads one number. Weights are loaded once on both sides, though hpsv2 1.2 loads them at every call.
Both sides score the same files with the same tiny networks in float32, in turn, in one process (and, on our side, the
worker processes asked for).
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from rich.console import Console
from torch.nn import functional

import reward_models
from diffalign.jobs import score
from diffalign.jobs.scoring import decode
from diffalign.jobs.scoring.engine import Judge
from diffalign.jobs.scoring.places import open_places
from diffalign.shapes.captions import random_scene
from diffalign.shapes.render import render

PLACES = {"pickscore": "assets/tiny-pickscore", "hpsv2": "assets/tiny-hpsv2"}
SIDES = (64, 128, 256, 512)  # pixels, in equal parts
IMAGES = 512
ROUNDS = 5
WORKERS = (0, 1)
Step = Callable[[Path, str], float]


def run(images: int = IMAGES, rounds: int = ROUNDS) -> dict[str, object]:
    """Time both sides and the stages of ours in turn; return medians in images/s and the medians of paired ratios."""
    torch.set_num_threads(1)  # both sides: on a shared machine threads that wait for one another measure the others
    with tempfile.TemporaryDirectory() as folder:
        places, prompts = draw(Path(folder), images)
        scorers = {name: reward_models.load(name, place) for name, place in PLACES.items()}
        steps = {"pickscore": pickscore_step(scorers["pickscore"]), "hpsv2": hpsv2_step(scorers["hpsv2"])}
        judges = [Judge.of(scorer) for scorer in scorers.values()]
        sides: dict[str, Callable[[], object]] = {"loop": lambda: loop(places, prompts, steps)}
        for workers in WORKERS:
            sides[f"diffalign, {workers} workers"] = lambda w=workers: ours(folder, judges, w)
        sides |= stages(places, scorers)
        agree = compare(sides["loop"](), sides[f"diffalign, {WORKERS[0]} workers"]())
        times, busy = ({name: [] for name in sides} for _ in range(2))
        for _ in range(rounds):
            for name, take in sides.items():
                for scorer in scorers.values():
                    scorer.clear_cache()
                start, cpu = time.perf_counter(), time.process_time()
                take()
                times[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - cpu)
    return {
        "what": f"{images} PNG of {SIDES} px, {len(set(prompts))} prompts, tiny pickscore and hpsv2, {rounds} rounds",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "images_per_second": rates(times, images),
        "images_per_cpu_second_of_the_main_process": rates(busy, images),
        "speedup": speedups(times),
        "speedup_in_cpu_time_of_the_main_process": speedups(busy),
        "largest_difference_of_scores": agree,
    }


def rates(times: dict[str, list[float]], images: int) -> dict[str, float]:
    """Return the median of images/s."""
    return {name: round(images / statistics.median(values), 1) for name, values in times.items()}


def speedups(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median, least and largest of the ratios of each round to the loop in the same round."""
    found = {}
    for name, values in times.items():
        if name.startswith("diffalign"):
            ratios = [loop / own for own, loop in zip(values, times["loop"], strict=True)]
            found[name] = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return {name: {key: round(value, 2) for key, value in part.items()} for name, part in found.items()}


def draw(folder: Path, count: int) -> tuple[list[Path], list[str]]:
    """Write pictures of the embedded world and their captions; four pictures a caption."""
    rng, files, captions = random.Random(0), [], []
    for index in range(count):
        if index % 4 == 0:
            scene = random_scene(rng)
        file = folder / f"{index:05d}.png"
        picture = render(scene, rng, SIDES[index // 4 % len(SIDES)])
        picture.save(file)
        files.append(file)
        captions.append(scene.caption())
    lines = pd.DataFrame({"image": [file.name for file in files], "caption": captions})
    lines.to_json(folder / "metadata.jsonl", orient="records", lines=True)
    return files, captions


@torch.no_grad()
def loop(files: list[Path], prompts: list[str], steps: dict[str, Step]) -> dict[str, np.ndarray]:
    """Score one image at a time, as the READMEs of the packages show it."""
    found = {name: [step(f, p) for f, p in zip(files, prompts, strict=True)] for name, step in steps.items()}
    return {name: np.array(values) for name, values in found.items()}


def pickscore_step(scorer) -> Step:
    """Return PickScore's `calc_probs` for one image (yuvalkirstain/PickScore, README)."""
    from transformers import AutoProcessor, CLIPModel

    processor, model = (
        AutoProcessor.from_pretrained(PLACES["pickscore"]),
        CLIPModel.from_pretrained(PLACES["pickscore"]),
    )
    length = {"padding": True, "truncation": True, "max_length": scorer.text_length, "return_tensors": "pt"}

    def step(file: Path, prompt: str) -> float:
        image = processor(images=[Image.open(file)], return_tensors="pt")
        text = processor(text=prompt, **length)
        image_embs = functional.normalize(model.get_image_features(**image).pooler_output, dim=-1)
        text_embs = functional.normalize(model.get_text_features(**text).pooler_output, dim=-1)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T)[0]).item()

    return step


def hpsv2_step(scorer) -> Step:
    """Return the body of the loop of `hpsv2.score` (tgxs002/HPSv2, img_score.py); float32 as there on a CPU."""
    model = scorer.module

    def step(file: Path, prompt: str) -> float:
        image = scorer.preprocess(Image.open(file).convert("RGB")).unsqueeze(0)
        text = scorer.tokenizer([prompt])
        image_embs = functional.normalize(model.encode_image(image), dim=-1)
        text_embs = functional.normalize(model.encode_text(text), dim=-1)
        return torch.diagonal(image_embs @ text_embs.T).item()

    return step


def ours(folder: str, judges: list[Judge], workers: int) -> dict[str, np.ndarray]:
    """Score the files as `diffalign score` does, journal and output file included."""
    out = Path(folder) / "scores" / "scores.parquet"
    options = score.Options(workers=workers, fresh=True)
    source = open_places([folder])
    table = score.score_pictures(source, out, judges, options, Console(quiet=True))
    return {name: part["score"].to_numpy() for name, part in table.groupby("scorer", sort=False)}


def stages(files: list[Path], scorers: dict) -> dict[str, Callable[[], object]]:
    """Return what the pass consists of, each alone: reading, decoding, making pixels, the networks."""
    recipes = {name: scorer.recipe for name, scorer in scorers.items()}
    pictures = [decode.decode(file.read_bytes()) for file in files]
    contents = [file.read_bytes() for file in files]
    pixels = {name: torch.stack([recipe(picture) for picture in pictures]) for name, recipe in recipes.items()}
    return {
        "stage: reading": lambda: [file.read_bytes() for file in files],
        "stage: decoding": lambda: [decode.decode(content) for content in contents],
        "stage: pixels": lambda: [recipe(picture) for picture in pictures for recipe in recipes.values()],
        "stage: networks": lambda: [s.score_prepared(pixels[name], "a flag") for name, s in scorers.items()],
    }


def compare(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, float]:
    """Return by scorer the largest difference."""
    return {name: float(np.abs(a[name] - b[name]).max()) for name in a}
