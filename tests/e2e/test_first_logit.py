"""Before training the policy is the reference: the first DPO logit is 0 to the bit, however latents come about."""

import numpy as np
import pytest

from diffalign.training import metrics

WAYS = {
    "cached": {},
    "uncached": {"cache_latents": False},
    "random crop": {"cache_latents": False, "random_crop": True},
}


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_the_first_logit_is_exactly_0(content, run, tmp_path, way, tune):
    # The embedded model's weights: random ones of a smaller network gave equal bits in either memory format.
    content["model"] = {"pretrained_model_name_or_path": "assets/tiny-sdxl", "tune": tune}
    content["data"] |= WAYS[way]
    content["train"] |= {"max_train_steps": 1, "train_batch_size": 7}
    if tune == "full":
        del content["lora"]
    run(content)
    (line,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert line["margin"] == 0.0
    assert line["loss"] == np.log(np.float32(2))
