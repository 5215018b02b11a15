"""Validation grids reach every tracker through accelerate's own interface."""

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from diffalign.jobs.training import validation


class Recorder(GeneralTracker):
    """Keep what is logged, as W&B's tracker would send it."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged = []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        pass

    def log_images(self, values, step=None):
        self.logged.append((step, values))


def test_a_grid_is_logged_with_its_step():
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=[recorder])
    accelerator.init_trackers("test")
    grid = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    validation.send(grid, 20, accelerator)
    assert recorder.logged == [(20, {"validation": [grid]})]
