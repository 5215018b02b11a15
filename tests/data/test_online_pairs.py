import pytest
import torch

from diffalign.data import OnlinePairs, PairTransform, open_pairs
from diffalign.data.pairs import ImageRef
from diffalign.data.transforms import to_images
from tests.data.caching import fixed
from tests.data.world import TinyEncoder, picture


def test_random_crops_online(parquet):
    source = open_pairs(parquet)
    online = OnlinePairs(source, TinyEncoder(), PairTransform(16, center_crop=False))
    settings = {"flips": [False, True], "drop_caption": [False, False]}
    with pytest.raises(ValueError, match="crops"):
        online.batch([0, 1], fixed(**settings))
    batch = online.batch([0, 1], fixed(crops=torch.tensor([[0.0, 0.0], [0.5, 0.99]]), **settings))
    assert batch.sizes[:, 3].tolist() == [0, 0, 0, 0]  # left edge, twice mirrored: the right edge becomes the left one
    assert torch.equal(batch.sizes[:2], batch.sizes[2:])
    image = to_images([online.transform.view(ImageRef(data=picture(0)).load(), (0.0, 0.0)).pixels])
    torch.testing.assert_close(batch.latent_mean[0], TinyEncoder().encode_images(image)[0][0], rtol=1e-5, atol=1e-6)
