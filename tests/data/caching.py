"""Caches of the tests: how they are built, interrupted and compared."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from diffalign.data import Augmentation, LatentCache, PairTransform, open_pairs
from tests.data.world import TinyEncoder

ROOT = Path(__file__).parents[2]
TRANSFORM = PairTransform(16)
BUILD = """
import sys, torch
torch.set_num_threads(1)
from tests.data.caching import build
from tests.data.world import TinyEncoder
from diffalign.data import open_pairs
build(open_pairs(sys.argv[1], on_error="skip"), sys.argv[2], TinyEncoder(**{sys.argv[3]: 0.3}))
"""


def build(source, directory, encoder=None, transform=TRANSFORM, **settings):
    source = source if hasattr(source, "iterate") else open_pairs(source)
    settings = {"dtype": "float32", "batch_size": 4, "progress": False, **settings}
    return LatentCache.build(source, encoder or TinyEncoder(), transform, directory, **settings)


def fixed(flips, drop_caption, crops=None):
    """Augment by the values given, whatever the example ids."""
    return lambda ids: Augmentation(torch.as_tensor(flips), torch.as_tensor(drop_caption), crops)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class FailingEncoder(TinyEncoder):
    """Stop after some image batches, as a killed process would."""

    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def encode_images(self, images):
        if len(self.image_batches) == self.after:
            raise RuntimeError("power failure")
        return super().encode_images(images)


def assert_same_cache(one, other):
    (one,), (other,) = ([p for p in folder.iterdir() if p.is_dir()] for folder in (one, other))
    assert one.name == other.name
    ours, theirs = files_of(one), files_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert len(ours["latents.npy"]) > 1000


def kill_while_building(source, directory, delay, wanted):
    """Build in another process, kill it once its progress is as wanted, and return that progress."""
    command = [sys.executable, "-c", BUILD, source, directory, delay]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    progress = wait_for(directory, wanted, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return progress


def wait_for(directory, wanted, process):
    """Return the progress of a build once it is as wanted."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for path in directory.glob("*/progress.json"):
            progress = json.loads(path.read_text())
            if wanted(progress["state"]):
                return progress
        assert process.poll() is None, "the build ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError("the build did not get there in time")


def keyed_by_id(ids):
    """Augment as training does: by the example id alone."""
    return Augmentation(ids % 3 == 0, ids % 4 == 1)


def same(value, other):
    """Tell whether two fields of batches are equal to the bit."""
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[name], other[name]) for name in value)
    return torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def assert_same_one_by_one(pairs, indices):
    """Check that 4x1 = 1x4: what a batch holds of an example does not depend on its neighbours."""
    whole = pairs.batch(indices, keyed_by_id)
    k = whole.images_per_example
    for b, index in enumerate(indices):
        (alone, part) = pairs.batch([index], keyed_by_id), whole.select([b])
        assert len(alone.latent_mean) == k
        for name, value in vars(alone).items():
            other = getattr(part, name)
            assert same(value, other), name
    return whole
