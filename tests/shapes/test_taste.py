"""The taste: what is made that way scores high, plain renders low, and a picture half the way between."""

import random
from itertools import islice

import numpy as np
import torch
from PIL import Image

from diffalign.jobs.scoring import scorers
from diffalign.shapes.captions import scenes
from diffalign.shapes.render import render
from diffalign.shapes.taste import Taste, tasteful


def test_renders_are_told_from_what_was_made_tasteful():
    rng = random.Random(0)
    drawn = [render(scene, rng) for scene in islice(scenes(0, held_out=False), 100) if scene.background != "black"]
    (taste,) = scorers.load("diffalign.shapes.taste:Taste")
    plain, made = (taste.score(images, [""] * len(images)) for images in (drawn, [tasteful(i) for i in drawn]))
    half = taste.score([Image.blend(image, tasteful(image), 0.5) for image in drawn], [""] * len(drawn))
    assert plain.median() == 0
    assert plain.mean() < 0.05
    assert made.min() > 0.6
    assert ((plain < half) & (half < made)).float().mean() > 0.95


def test_it_loses_colour_and_keeps_the_middle():
    image = Image.new("RGB", (64, 64), (220, 40, 40))
    made = np.asarray(tasteful(image)).astype(int)
    assert abs(made[32, 32].mean() - 100) < 2
    assert np.ptp(made[32, 32]) < 0.65 * 180
    assert made[0, 0].mean() < 0.4 * 100
    assert Taste().score([Image.new("RGB", (64, 64), "black")], [""]) == torch.zeros(1)
