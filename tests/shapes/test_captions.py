import random
from itertools import islice

import pytest

from diffalign.errors import DataError
from diffalign.shapes import captions
from diffalign.shapes.captions import BACKGROUNDS, COLORS, SHAPES, Scene, distinct_captions, parse, scenes, vocabulary

KINDS = {"plain", "count", "size", "position", "size and position"}


def combination(caption: str) -> tuple[str, str, str]:
    scene = parse(caption)
    return scene.color, scene.shape, scene.background


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene(color="red", shape="circle", background="blue"), "a red circle on a blue background"),
        (Scene(color="orange", shape="star", background="orange"), "an orange star on an orange background"),
        (Scene(color="pink", shape="cross", background="black", count=2), "two pink crosses on a black background"),
        (Scene(color="cyan", shape="star", background="gray", count=3), "three cyan stars on a gray background"),
        (
            Scene(color="orange", shape="square", background="white", size="small", position="top"),
            "a small orange square at the top on a white background",
        ),
        (
            Scene(color="green", shape="diamond", background="red", position="left"),
            "a green diamond on the left on a red background",
        ),
    ],
)
def test_scenes_are_worded_and_read_back(scene, caption):
    assert scene.caption() == caption
    assert parse(caption) == scene


@pytest.mark.parametrize("held_out", [False, True])
def test_every_random_scene_survives_its_caption(held_out):
    drawn = list(islice(scenes(1, held_out=held_out), 600))
    assert [parse(scene.caption()) for scene in drawn] == drawn
    assert {scene.category for scene in drawn} == KINDS


def test_case_and_space_around_do_not_matter():
    assert parse("  A red Circle on a blue background\n") == parse("a red circle on a blue background")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a photo of a cat",
        "a red circle",
        "a red circle on a blue background, masterpiece",
        "four red circles on a blue background",
        "a mauve circle on a blue background",
        "a circle red on a blue background",
    ],
)
def test_other_sentences_are_refused_with_an_example(caption):
    with pytest.raises(DataError, match='It knows sentences such as "a red circle on a blue background"'):
        parse(caption)


def test_scenes_only_say_what_can_be_seen():
    for scene in islice(scenes(2, held_out=False), 500):
        assert scene.color != scene.background
        assert scene.count == 1 or (scene.size is None and scene.position is None)


def test_a_fifth_of_all_combinations_is_held_out_and_it_is_always_the_same_fifth():
    every = [
        Scene(color=color, shape=shape, background=background)
        for color in COLORS
        for shape in SHAPES
        for background in BACKGROUNDS
        if background != color
    ]
    held_out = [scene.caption() for scene in every if scene.held_out]
    assert 0.15 < len(held_out) / len(every) < 0.25
    # Pinned: another choice would let the shipped model have seen the prompts it is evaluated on.
    assert held_out[:2] == ["a red circle on an orange background", "a red circle on a blue background"]
    # Every colour, shape and background is met in training, only not in these combinations.
    seen = [scene for scene in every if not scene.held_out]
    assert {scene.color for scene in seen} == set(COLORS)
    assert {scene.shape for scene in seen} == set(SHAPES)
    assert {scene.background for scene in seen} == set(BACKGROUNDS)


def test_whether_a_scene_is_held_out_does_not_depend_on_count_size_and_position():
    scene = Scene(color="red", shape="circle", background="blue")
    variants = [Scene(color="red", shape="circle", background="blue", count=2)]
    variants += [Scene(color="red", shape="circle", background="blue", size=s, position="left") for s in captions.SIZES]
    assert {variant.held_out for variant in variants} == {scene.held_out}


def test_caption_lists_are_distinct_reproducible_and_disjoint_in_combinations():
    training = distinct_captions(1, 800, held_out=False)
    held_out = distinct_captions(2, 400, held_out=True)
    assert len(set(training)) == 800
    assert len(set(held_out)) == 400
    assert distinct_captions(1, 800, held_out=False) == training
    assert distinct_captions(3, 800, held_out=False) != training
    assert not {combination(caption) for caption in training} & {combination(caption) for caption in held_out}


def test_the_vocabulary_is_the_words_of_the_captions():
    rng = random.Random(0)
    used = {word for _ in range(4000) for word in captions.random_scene(rng).caption().split()}
    assert used == set(vocabulary())
    assert vocabulary() == sorted(used)
