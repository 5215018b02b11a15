"""Numbers of images, made to fit the images."""

from torch import Tensor


def spread(values: Tensor, images: Tensor) -> Tensor:
    """Return values [N] with trailing ones, to multiply images [N,...]."""
    return values.view(-1, *(1 for _ in images.shape[1:]))
