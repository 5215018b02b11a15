"""Draw one image with a pipeline, and train adapters a little, the same way in every test."""

import torch

from diffalign.backbones.families import pipeline_kind

PROMPT = "a red circle on a blue background"


def draw(pipeline, steps: int = 2) -> torch.Tensor:
    """Return one guided image [1,3,64,64] in [0,1] from fixed noise."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    options = {"num_inference_steps": steps, "height": 64, "width": 64, "output_type": "pt", "generator": generator}
    return pipeline(prompt=PROMPT, **options, **pipeline_kind(pipeline).drawing_options(pipeline)).images


def perturb(parameters, seed: int = 1, scale: float = 0.05) -> None:
    """Move parameters as training would, so that adapters with B = 0 begin to act."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
