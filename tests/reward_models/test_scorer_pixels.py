import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from reward_models.base import ScorerError
from reward_models.preprocess import PixelSpec, clip_pil, clip_tensor_aa, hps_letterbox, spm_tensor_noaa, to_tensor
from tests import golden

RECORDS = golden.load("rewards")
SPEC = PixelSpec()
FUNCTIONS = {
    "clip_pil": lambda image: clip_pil(image, SPEC),
    "clip_tensor_aa": lambda image: clip_tensor_aa(to_tensor(image), SPEC),
    "hps_letterbox": lambda image: hps_letterbox(to_tensor(image), SPEC),
    "spm_tensor_noaa": lambda image: spm_tensor_noaa(to_tensor(image), SPEC),
    "hps_letterbox_noaa": lambda image: hps_letterbox(to_tensor(image), SPEC, antialias=False),
}


def golden_image(kind, width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    if kind == "hash":
        return Image.fromarray(((7 * x + 13 * y + 29 * c + (x * y) % 251) % 256).astype(np.uint8))
    wave = np.sin((x + 1) * (c + 1) / 37) * np.cos((y + 1) * (c + 2) / 53)
    return Image.fromarray(np.floor(127.5 + 127.5 * wave).astype(np.uint8))


def test_every_preprocessing_golden_is_covered():
    assert sum(record_id.startswith("pre_") for record_id in RECORDS) == 39


@pytest.mark.parametrize(
    "record_id", [key for key in RECORDS if key.startswith("pre_") and "probe" in RECORDS[key]["expected"]]
)
def test_pixels_match_the_official_code(record_id):
    function, kind, size = record_id.removeprefix("pre_").rsplit("_", 2)
    image = golden_image(kind, *map(int, size.split("x")))
    pixels = FUNCTIONS[function](image)
    record = RECORDS[record_id]
    assert list(pixels.shape) == record["expected"]["shape"]
    golden.assert_close(record, "mean", pixels.double().mean())
    golden.assert_close(record, "std_unbiased", pixels.double().std())
    golden.assert_close(record, "probe", torch.stack([pixels[tuple(at)] for at in record["expected"]["probe_cyx"]]))


def test_letterbox_pads_where_the_official_code_forgets():
    record = RECORDS["pre_hps_letterbox_smooth_224x160"]
    image = to_tensor(golden_image("smooth", 224, 160))
    pixels = hps_letterbox(image, SPEC)
    unpadded = SPEC.normalise(image)
    assert list(unpadded.shape) == record["expected"]["shape"]
    assert pixels.shape == (3, 224, 224)
    assert torch.equal(pixels[:, 32:192], unpadded)
    black = SPEC.normalise(torch.zeros(3, 32, 224))
    assert torch.equal(pixels[:, :32], black)
    assert torch.equal(pixels[:, 192:], black)


@pytest.mark.parametrize(("width", "height"), [(227, 224), (224, 231), (301, 200), (100, 80), (37, 300), (224, 224)])
def test_clip_pil_is_the_hugging_face_processor(width, height):
    """The excess of 227 is 3 modulo 4: there torchvision's centre crop starts one pixel later."""
    image = golden_image("hash", width, height)
    official = CLIPImageProcessorPil()(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(clip_pil(image, SPEC), official, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_tensor_path_follows_the_pil_path(size):
    image, spec = golden_image("smooth", 300, 240), PixelSpec(size=size)
    difference = (clip_tensor_aa(to_tensor(image), spec) - clip_pil(image, spec)).abs()
    assert difference.mean() < 0.006
    assert difference.max() < 0.04


@pytest.mark.parametrize("function", [clip_tensor_aa, hps_letterbox, spm_tensor_noaa])
def test_batches_equal_single_images_and_carry_gradients(function):
    images = torch.stack([to_tensor(golden_image(kind, 60, 48)) for kind in ("hash", "smooth")]).requires_grad_()
    pixels = function(images, PixelSpec(size=32))
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels[1], function(images[1], PixelSpec(size=32)))
    pixels.square().mean().backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_letterbox_survives_extreme_shapes():
    pixels = hps_letterbox(torch.ones(3, 1, 2000), SPEC)
    assert pixels.shape == (3, 224, 224)
    assert (pixels[0] > 0).any(dim=1).sum() == 1  # one white row remains


def test_spec_comes_from_a_hugging_face_config():
    old_style = {"size": 64, "crop_size": 64, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    new_style = {**old_style, "size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    expected = PixelSpec(size=64, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    for config in (old_style, new_style):
        assert PixelSpec.from_clip_config(config, image_size=64, source="test") == expected
    assert PixelSpec.from_clip_config({}, image_size=224, source="test") == SPEC


@pytest.mark.parametrize(
    ("config", "named"),
    [({"size": 256}, "size = 256"), ({"resample": 2}, "resample = 2"), ({"do_center_crop": False}, "do_center_crop")],
)
def test_a_processor_that_is_not_clips_is_refused(config, named):
    with pytest.raises(ScorerError, match=named):
        PixelSpec.from_clip_config(config, image_size=224, source="somewhere")
