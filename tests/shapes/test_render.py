import random
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from diffalign.shapes import render
from diffalign.shapes.captions import PALETTE, SHAPES, Scene, scenes

SCENES = list(islice(scenes(3, held_out=False), 60))


def test_a_picture_is_a_function_of_scene_and_generator():
    for scene in SCENES[:10]:
        first, second = (render.render(scene, random.Random(7)) for _ in range(2))
        assert first.tobytes() == second.tobytes()
        assert first.tobytes() != render.render(scene, random.Random(8)).tobytes()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_pictures_have_the_size_asked_for(size):
    image = render.render(SCENES[0], random.Random(0), size)
    assert (image.size, image.mode) == ((size, size), "RGB")


def test_colours_are_those_of_the_palette_up_to_jitter():
    for scene in SCENES:
        pixels = np.asarray(render.render(scene, random.Random(1)), dtype=float)
        corner = np.abs(pixels[0, 0] - PALETTE[scene.background])
        nearest = np.linalg.norm(pixels - PALETTE[scene.color], axis=-1).min()
        assert corner.max() < 5 * render.COLOR_JITTER
        assert nearest < 5 * render.COLOR_JITTER


def test_objects_stay_inside_and_apart():
    for scene in SCENES:
        for seed in range(5):
            spots = render.place(scene, random.Random(seed))
            assert len(spots) == scene.count
            for x, y, radius in spots:
                assert radius < x < 1 - radius
                assert radius < y < 1 - radius
            for i, (x, y, radius) in enumerate(spots):
                for other_x, other_y, _ in spots[:i]:
                    assert max(abs(x - other_x), abs(y - other_y)) >= 2 * radius + render.GAP - 1e-9


@pytest.mark.parametrize(
    ("position", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("top", 1, -1), ("bottom", 1, 1)]
)
def test_positions_are_where_they_say(position, axis, sign):
    scene = Scene(color="red", shape="star", background="white", position=position)
    for seed in range(20):
        spot = render.place(scene, random.Random(seed))[0]
        assert sign * (spot[axis] - 0.5) > 0.15
        assert abs(spot[1 - axis] - 0.5) < 0.05


def test_sizes_do_not_overlap():
    sizes = {
        size: [
            render.place(Scene(color="red", shape="star", background="white", size=size), random.Random(seed))[0][2]
            for seed in range(50)
        ]
        for size in ("small", None, "large")
    }
    assert max(sizes["small"]) < min(sizes[None])
    assert max(sizes[None]) < min(sizes["large"])


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_box(shape):
    corners = np.array(render.outline(shape))
    np.testing.assert_allclose(corners.min(axis=0), -1, atol=1e-12)
    np.testing.assert_allclose(corners.max(axis=0), 1, atol=1e-12)


def test_coverage_is_the_share_of_the_box_a_shape_covers():
    expected = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "diamond": 0.5, "cross": 5 / 9}
    for shape, share in expected.items():
        assert render.coverage(shape, 60, 60).mean() == pytest.approx(share, abs=0.02)
    assert render.coverage("circle", 20, 40).shape == (20, 40)


def test_edges_are_anti_aliased():
    scene = Scene(color="red", shape="circle", background="white")
    image = render.render(scene, random.Random(0))
    assert isinstance(image, Image.Image)
    assert len(image.getcolors(maxcolors=4096)) > 10
