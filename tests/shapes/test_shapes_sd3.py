"""The embedded flow model: a real pipeline that draws, loads as a backbone, and learns by the same loop as SDXL's."""

import pytest
import torch

from diffalign.backbones import loading
from diffalign.shapes.pipeline import RESOLUTION
from diffalign.shapes.sd3 import build_pipeline

CAPTION = "a red circle on a blue background"


@pytest.mark.parametrize("t5", [False, True])
def test_it_is_a_real_sd3_pipeline_that_loads_as_a_backbone(t5, tmp_path):
    pipeline = build_pipeline(0, t5=t5)
    pipeline.save_pretrained(tmp_path / "tiny")
    assert sum(file.stat().st_size for file in (tmp_path / "tiny").rglob("*")) < 20e6 or t5
    backbone = loading.load(tmp_path / "tiny")
    assert (backbone.family, len(backbone.text_encoders)) == ("sd3", 3 if t5 else 2)
    assert backbone.denoiser.config.sample_size * backbone.vae_scale_factor == RESOLUTION
    with torch.no_grad():
        text = backbone.encode_prompts([CAPTION])
        embeds, _, pooled, _ = pipeline.encode_prompt(CAPTION, CAPTION, CAPTION, do_classifier_free_guidance=False)
    kept = text["prompt_embeds"]
    torch.testing.assert_close(kept, embeds[:, : kept.shape[1]])
    assert not embeds[:, kept.shape[1] :].any()  # in the place of T5
    torch.testing.assert_close(text["pooled_prompt_embeds"], pooled)
    if t5:
        words = backbone.tokenizers[2]([CAPTION]).input_ids[0]
        assert len(words) == len(CAPTION.split()) + 1  # a token a word, and the end
        assert backbone.tokenizers[2].unk_token_id not in words
