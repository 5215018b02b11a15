"""`diffalign score` against the loop of the published packages (`score_loop`), on the embedded world.

Both sides score the same files with the same weights in float32, in turn, on one thread; ours also with worker
processes beside it, each of one thread. `--large` does it with ViT-H on a GPU.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

import reward_models
from benchmarks.score_loop import Step, hpsv2_step, loop, pickscore_step
from diffalign.jobs.scoring import decode, score
from diffalign.jobs.scoring.engine import Judge
from diffalign.jobs.scoring.places import open_places
from diffalign.shapes.captions import random_scene
from diffalign.shapes.render import render
from reward_models.hf_clip import VIT_H_14, load_tokenizer, parse_config, preprocessor_config
from reward_models.hpsv2 import OFFICIAL_MODEL, HPSv2, build_clip
from reward_models.pickscore import PickScore
from reward_models.preprocess import PixelSpec
from reward_models.tokenization import bundled_bpe_file

PLACES = {"pickscore": "assets/tiny-pickscore", "hpsv2": "assets/tiny-hpsv2"}
SIDES = (64, 128, 256, 512)  # pixels, in equal parts
LARGE_SIDES = (512, 768, 1024)
IMAGES = 512
ROUNDS = 5
WORKERS = (0, 1)
Networks = tuple[dict[str, Any], dict[str, Step]]  # our scorers, and a step of the published loop for each


def run(images: int = IMAGES, rounds: int = ROUNDS) -> dict[str, object]:
    """Measure the embedded scorers on the CPU."""
    measured = measure(tiny(), images, rounds, sides=SIDES, workers=WORKERS)
    return {"networks": "tiny pickscore and hpsv2, 65 tokens, 4 layers of width 128", **measured}


def run_large(images: int = IMAGES, rounds: int = ROUNDS) -> dict[str, object] | str:
    """Measure both scorers with random weights of the official size on a GPU; "not measured" without one."""
    if not torch.cuda.is_available():
        return "not measured"
    workers = (0, max(1, (os.cpu_count() or 1) - 1))
    measured = measure(random_networks("cuda"), images, rounds, sides=LARGE_SIDES, workers=workers)
    return {"networks": f"ViT-H-14 with random weights on {torch.cuda.get_device_name()}", **measured}


def measure(
    networks: Networks, images: int, rounds: int, *, sides: tuple[int, ...], workers: tuple[int, ...]
) -> dict[str, object]:
    """Time both sides and the stages of ours in turn; return medians in images/s and the medians of paired ratios."""
    torch.set_num_threads(1)  # both sides: on a shared machine threads that wait for one another measure the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command line
    scorers, steps = networks
    with tempfile.TemporaryDirectory() as folder:
        places, prompts = draw(Path(folder), images, sides)
        judges = [Judge.of(scorer) for scorer in scorers.values()]
        takes: dict[str, Callable[[], object]] = {"loop": lambda: loop(places, prompts, steps)}
        for count in workers:
            takes[f"diffalign, {count} workers"] = lambda count=count: ours(folder, judges, count)
        takes |= stages(places, scorers)
        agree = compare(takes["loop"](), takes[f"diffalign, {workers[0]} workers"]())
        times, busy = ({name: [] for name in takes} for _ in range(2))
        for _ in range(rounds):
            for name, take in takes.items():
                for scorer in scorers.values():
                    scorer.clear_cache()
                start, cpu = time.perf_counter(), time.process_time()
                take()
                times[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - cpu)
    return {
        "what": f"{images} PNG of {sides} px, {len(set(prompts))} prompts, {rounds} rounds",
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "images_per_second": rates(times, images),
        "images_per_cpu_second_of_the_main_process": rates(busy, images),
        "speedup": speedups(times),
        "speedup_in_cpu_time_of_the_main_process": speedups(busy),
        "largest_difference_of_scores": agree,
    }


def tiny() -> Networks:
    """Return the embedded scorers and their published loops."""
    from transformers import AutoProcessor, CLIPModel

    scorers = {name: reward_models.load(name, place) for name, place in PLACES.items()}
    processor = AutoProcessor.from_pretrained(PLACES["pickscore"])
    pickscore = pickscore_step(processor, CLIPModel.from_pretrained(PLACES["pickscore"]).eval())
    hps = scorers["hpsv2"]
    return scorers, {"pickscore": pickscore, "hpsv2": hpsv2_step(hps.module, hps.tokenizer, hps.spec)}


def random_networks(device: str, clip: Mapping = VIT_H_14, open_clip: Mapping = OFFICIAL_MODEL) -> Networks:
    """Return both scorers with random weights, of the official size unless said otherwise, and their loops."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    config = parse_config(clip, "the benchmark", activation="gelu")
    tokenizer, spec = load_tokenizer(None, config, "the benchmark"), PixelSpec()
    with torch.device(device):
        model, other = CLIPModel(config).eval(), build_clip(open_clip, source="the benchmark").eval()
    pickscore = PickScore(PickScore.cards[0], model, spec, tokenizer, source="random")
    hps = HPSv2(HPSv2.cards[0], other, spec, open_clip, bundled_bpe_file(), source="random")
    settings = {key: value for key, value in preprocessor_config(spec).items() if key != "image_processor_type"}
    processor = CLIPProcessor(CLIPImageProcessor(**settings), tokenizer)
    steps = {
        "pickscore": pickscore_step(processor, model),
        "hpsv2": hpsv2_step(other, hps.tokenizer, spec),
    }
    return {"pickscore": pickscore, "hpsv2": hps}, steps


def rates(times: dict[str, list[float]], images: int) -> dict[str, float]:
    """Return the median of images/s."""
    return {name: round(images / statistics.median(values), 1) for name, values in times.items()}


def speedups(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return median, least and largest of the ratios of each round to the loop in the same round."""
    found = {}
    for name, values in times.items():
        if name.startswith("diffalign"):
            ratios = [one / own for own, one in zip(values, times["loop"], strict=True)]
            found[name] = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return {name: {key: round(value, 2) for key, value in part.items()} for name, part in found.items()}


def draw(folder: Path, count: int, sides: tuple[int, ...]) -> tuple[list[Path], list[str]]:
    """Write pictures of the embedded world and their captions; four pictures a caption."""
    rng, files, captions = random.Random(0), [], []
    for index in range(count):
        if index % 4 == 0:
            scene = random_scene(rng)
        file = folder / f"{index:05d}.png"
        picture = render(scene, rng, sides[index // 4 % len(sides)])
        picture.save(file)
        files.append(file)
        captions.append(scene.caption())
    lines = pd.DataFrame({"image": [file.name for file in files], "caption": captions})
    lines.to_json(folder / "metadata.jsonl", orient="records", lines=True)
    return files, captions


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
