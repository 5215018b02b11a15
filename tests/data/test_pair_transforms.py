import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from diffalign.data.transforms import PairTransform
from diffalign.errors import DataError


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (100, 61), (61, 100), (17, 40), (333, 128), (45, 32)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_cut_equals_torchvision_bit_for_bit(size, interpolation):
    mode = transforms.InterpolationMode(interpolation)
    official = transforms.Compose(
        [transforms.Resize(32, interpolation=mode), transforms.CenterCrop(32), transforms.ToTensor()]
    )
    image = photo(*size)
    images, _ = PairTransform(32, interpolation=interpolation)(image, image)
    assert torch.equal(images[0], official(image))
    assert images.shape == (2, 3, 32, 32)


def test_the_pair_is_flipped_as_a_whole():
    pair = photo(40, 32, 1), photo(50, 32, 2)
    transform = PairTransform(32)
    straight, _ = transform(*pair)
    flipped, _ = transform(*pair, flip=True)
    assert torch.equal(flipped, straight.flip(-1))
    assert not torch.equal(flipped[0], straight[0])
    assert not torch.equal(flipped[1], straight[1])


def test_sizes_tell_each_images_own_size_and_crop():
    # 90x60 becomes 48x32: 8 columns go on either side; 40x80 becomes 32x64: 16 rows go above.
    _, sizes = PairTransform(32)(photo(90, 60), photo(40, 80))
    assert sizes.tolist() == [[60, 90, 0, 8, 32, 32], [80, 40, 16, 0, 32, 32]]
    assert sizes.dtype == torch.float32


def test_flipped_crop_is_where_the_mirrored_image_is_cut():
    image = photo(37, 32)  # 5 columns too many: 2 go left and 3 right, so the mirrored image is cut at 3
    transform = PairTransform(32)
    images, sizes = transform(image, image, flip=True)
    assert sizes[0].tolist() == [32, 37, 0, 3, 32, 32]
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((3, 0, 35, 32))
    assert torch.equal(images[0], transforms.ToTensor()(mirrored))


def test_constant_sizes_of_the_official_script():
    _, sizes = PairTransform(32, sizes="resolution")(photo(90, 60), photo(40, 80), flip=True)
    assert sizes.tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_random_crop_is_placed_by_its_draws_and_joint():
    transform = PairTransform(32, center_crop=False)
    image, twin = photo(52, 32, 1), photo(52, 32, 1)
    corners = set()
    for draw in (0.0, 0.3, 0.999999):
        images, sizes = transform(image, twin, crop=(0.5, draw))
        assert torch.equal(images[0], images[1])
        left = int(sizes[0, 3])
        assert torch.equal(images[0], transforms.ToTensor()(image.crop((left, 0, left + 32, 32))))
        corners.add(left)
    assert corners == {0, 6, 20}


def test_random_crop_needs_draws():
    with pytest.raises(ValueError, match="draws"):
        PairTransform(32, center_crop=False)(photo(52, 32), photo(52, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"resolution": 33}, "multiple of 8, got 33"), ({"resolution": 0}, "got 0"),
     ({"resolution": 32, "interpolation": "cubic"}, 'got "cubic"'), ({"resolution": 32, "sizes": "x"}, 'got "x"')],
)  # fmt: skip
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        PairTransform(**settings)


def test_identity_holds_every_setting():
    base = PairTransform(32).identity
    changes = [
        {"resolution": 64}, {"center_crop": False}, {"random_flip": False}, {"interpolation": "lanczos"},
        {"sizes": "resolution"},
    ]  # fmt: skip
    assert all(PairTransform(**{"resolution": 32, **change}).identity != base for change in changes)
    assert {name for change in changes for name in change} == set(base)
