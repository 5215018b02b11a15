import random
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import DataError
from diffalign.shapes.captions import PALETTE, Scene, scenes
from diffalign.shapes.oracle import ATTRIBUTES, Oracle, measure
from diffalign.shapes.render import render

FULL = Scene(color="red", shape="circle", background="blue", size="small", position="left")
MANY = Scene(color="yellow", shape="square", background="black", count=2)


def rendered(number: int, seed: int = 0, size: int = 64) -> tuple[list[Image.Image], list[str]]:
    """Return pictures that show exactly what their captions say."""
    rng = random.Random(seed)
    drawn = list(islice(scenes(seed, held_out=False), number))
    return [render(scene, rng, size) for scene in drawn], [scene.caption() for scene in drawn]


@pytest.mark.parametrize("size", [64, 128, 96])
def test_truths_score_near_one_in_every_attribute(size):
    images, prompts = rendered(240 if size == 64 else 60, size=size)
    oracle = Oracle()
    scores = oracle.score(images, prompts)
    assert scores.mean() > 0.97
    assert scores.min() > 0.75
    for name, values in oracle.attributes(images, prompts).items():
        mentioned = values[~values.isnan()]
        assert len(mentioned) > 10, name
        assert mentioned.mean() > 0.95, name


def test_truths_made_larger_score_as_before():
    images, prompts = rendered(40)
    large = [image.resize((256, 256), Image.Resampling.BICUBIC) for image in images]
    torch.testing.assert_close(Oracle().score(large, prompts), Oracle().score(images, prompts), atol=0.12, rtol=0)


WRONG = [
    ("color", FULL, {"color": "green"}),
    ("color", FULL, {"color": "purple"}),
    ("background", FULL, {"background": "white"}),
    ("background", FULL, {"background": "cyan"}),
    ("shape", FULL, {"shape": "square"}),
    ("shape", FULL, {"shape": "diamond"}),
    ("size", FULL, {"size": "large"}),
    ("position", FULL, {"position": "right"}),
    ("position", FULL, {"position": "top"}),
    ("position", replace(FULL, position="bottom"), {"position": "top"}),
    ("count", MANY, {"count": 1}),
    ("count", MANY, {"count": 3}),
    ("color", MANY, {"color": "pink"}),
    ("shape", MANY, {"shape": "triangle"}),
    ("background", MANY, {"background": "gray"}),
]


@pytest.mark.parametrize(("attribute", "scene", "change"), WRONG)
def test_one_wrong_attribute_is_found_and_the_others_keep_their_score(attribute, scene, change):
    for seed in range(8):
        scores = measure(render(replace(scene, **change), random.Random(seed)), scene)
        assert scores[attribute] < 0.5, f"seed {seed}: {scores}"
        others = {name: score for name, score in scores.items() if name != attribute}
        assert min(others.values()) > 0.7, f"seed {seed}: {scores}"


def test_the_mean_falls_with_every_wrong_attribute():
    changes = [{}, {"color": "green"}, {"shape": "square"}, {"size": "large"}, {"position": "right"}]
    shown, scores = FULL, []
    for change in changes:
        shown = replace(shown, **change)
        scores.append(Oracle().score([render(shown, random.Random(0))], [FULL.caption()]).item())
    assert all(later < earlier - 0.1 for earlier, later in pairwise(scores))


def test_a_blank_picture_only_has_its_background_right():
    right = Image.new("RGB", (64, 64), PALETTE["blue"])
    scores = measure(right, FULL)
    assert scores.pop("background") == pytest.approx(1.0)
    assert scores == dict.fromkeys(("color", "shape", "count", "size", "position"), 0.0)
    wrong = Image.new("RGB", (64, 64), PALETTE["yellow"])
    assert Oracle().score([wrong], [FULL.caption()]).item() == 0.0


def test_noise_scores_low():
    rng = np.random.default_rng(0)
    prompts = [scene.caption() for scene in islice(scenes(4, held_out=False), 20)]
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in prompts]
    assert Oracle().score(noise, prompts).max() < 0.5
    assert Oracle().score(noise, prompts).mean() < 0.35


def test_specks_are_not_objects():
    image = render(FULL, random.Random(0))
    for x in range(40, 60, 5):
        image.putpixel((x, 50), (255, 255, 255))
    assert measure(image, FULL)["count"] == 1.0


def test_a_small_object_of_little_contrast_is_seen():
    scene = Scene(color="orange", shape="star", background="yellow", size="small")
    assert measure(render(scene, random.Random(0)), scene)["count"] == 1.0


def test_attributes_are_missing_where_the_caption_is_silent():
    plain = replace(FULL, size=None, position=None)
    images = [render(scene, random.Random(0)) for scene in (plain, FULL)]
    measured = Oracle().attributes(images, [plain.caption(), FULL.caption()])
    assert tuple(measured) == ATTRIBUTES
    assert [values.isnan().tolist() for values in measured.values()] == [[False, False]] * 4 + [[True, False]] * 2


def test_the_score_is_the_mean_of_what_is_mentioned():
    images, prompts = rendered(10, seed=5)
    images = images[1:] + images[:1]  # wrong pictures, so that the scores differ
    scores = Oracle().score(images, prompts)
    assert scores.dtype == torch.float32
    assert scores.std() > 0.05
    table = torch.stack(list(Oracle().attributes(images, prompts).values()))
    assert scores.tolist() == pytest.approx([column[~column.isnan()].mean().item() for column in table.T])
    alone = torch.cat([Oracle().score([image], [prompt]) for image, prompt in zip(images, prompts, strict=True)])
    assert torch.equal(alone, scores)


def test_other_modes_are_read_as_rgb():
    image = render(FULL, random.Random(0))
    assert measure(image.convert("RGBA"), FULL) == measure(image, FULL)
    assert measure(image.convert("L"), FULL)["color"] < 0.5


def test_a_caption_of_another_world_is_refused():
    with pytest.raises(DataError, match='cannot read the caption "a cat"'):
        Oracle().score([render(FULL, random.Random(0))], ["a cat"])


def test_images_and_prompts_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        Oracle().score([render(FULL, random.Random(0))], [FULL.caption()] * 2)
