"""Pictures are reproducible one by one, independent of the batch, and drawn once."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from diffalign.errors import DataError, ModelError, UserError
from diffalign.evaluation import Manifest, SamplingSettings, generate, generate_to, prompt_plan

PROMPTS = ["a red circle", "a blue square", "two green stars"]
SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, batch_size=2)


class Counting(StableDiffusionXLPipeline):
    """Note the size of every batch, and run out of memory above `limit`."""

    limit = 99
    calls: tuple[int, ...] = ()

    def __call__(self, prompt, **options):
        self.calls = (*self.calls, len(prompt))
        if len(prompt) > self.limit:
            raise torch.OutOfMemoryError("pretended")
        return super().__call__(prompt, **options)


@pytest.fixture
def pipeline(tiny_sdxl):
    loaded = Counting.from_pretrained(tiny_sdxl)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def test_a_picture_is_what_the_pipeline_draws_for_its_seed(pipeline):
    drawn = generate(pipeline, PROMPTS, [7, 8, 9], SETTINGS, progress=False)
    for prompt, seed, image in zip(PROMPTS, [7, 8, 9], drawn, strict=True):
        alone = StableDiffusionXLPipeline.__call__(
            pipeline,
            prompt,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        assert np.abs(pixels([image]) - pixels([alone])).max() <= 1
    assert np.abs(pixels(drawn[:1]) - pixels(drawn[1:2])).max() > 8


def test_batch_size_does_not_change_pictures(pipeline):
    one = SamplingSettings(num_inference_steps=2, batch_size=1)
    all_at_once = SamplingSettings(num_inference_steps=2, batch_size=8)
    single = generate(pipeline, PROMPTS, [0, 1, 2], one, progress=False)
    batched = generate(pipeline, PROMPTS, [0, 1, 2], all_at_once, progress=False)
    assert pipeline.calls == (1, 1, 1, 3)
    assert np.abs(pixels(single) - pixels(batched)).max() <= 1


def test_the_negative_prompt_and_the_size_reach_the_pipeline(pipeline):
    plain = generate(pipeline, PROMPTS[:1], [0], SETTINGS, progress=False)
    changed = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, negative_prompt="blue", width=32, height=48)
    assert generate(pipeline, PROMPTS[:1], [0], changed, progress=False)[0].size == (32, 48)
    against = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, negative_prompt="blue")
    assert (pixels(plain) != pixels(generate(pipeline, PROMPTS[:1], [0], against, progress=False))).any()


def test_memory_that_runs_out_halves_the_batch(pipeline):
    pipeline.limit = 1
    assert len(generate(pipeline, PROMPTS, [0, 1, 2], SETTINGS, progress=False)) == 3
    assert pipeline.calls == (2, 1, 1, 1)
    pipeline.limit = 0
    with pytest.raises(ModelError, match="single picture"):
        generate(pipeline, PROMPTS, [0, 1, 2], SETTINGS, progress=False)


def test_values_that_are_not_finite_are_refused(pipeline):
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"'a red circle' is not finite"):
        generate(pipeline, PROMPTS[:1], [0], SETTINGS, progress=False)


def test_a_safety_checker_is_refused(pipeline):
    pipeline.safety_checker = object()
    with pytest.raises(ModelError, match="safety_checker=None"):
        generate(pipeline, PROMPTS[:1], [0], SETTINGS, progress=False)


def test_finished_pictures_are_not_drawn_again(pipeline, tmp_path):
    first = generate_to(tmp_path, pipeline, PROMPTS, [4, 5, 6], SETTINGS, identity="m", progress=False)
    before = pixels([Image.open(path) for path in first.paths])
    first.paths[1].unlink()
    pipeline.calls = ()
    again = generate_to(tmp_path, pipeline, PROMPTS, [4, 5, 6], SETTINGS, identity="m", progress=False)
    assert pipeline.calls == (1,)
    assert np.abs(pixels([Image.open(path) for path in again.paths]) - before).max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*again.table["file"], ".lock", "manifest.parquet"]
    )


def test_an_interrupted_folder_goes_on_in_the_batches_it_had(pipeline, tmp_path):
    prompts, seeds, options = [PROMPTS[i % 3] for i in range(5)], list(range(5)), {"identity": "m", "progress": False}
    whole = generate_to(tmp_path / "whole", pipeline, prompts, seeds, SETTINGS, **options)

    def killed(*words, **given):
        if len(pipeline.calls) == 2:
            raise KeyboardInterrupt
        return StableDiffusionXLPipeline.__call__(pipeline, *words, **given)

    pipeline.calls = ()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Counting, "__call__", lambda self, *w, **g: _noted(self, killed, *w, **g))
        with pytest.raises(KeyboardInterrupt):
            generate_to(tmp_path / "told", pipeline, prompts, seeds, SETTINGS, **options)
    told = Manifest.read(tmp_path / "told")
    assert [path.exists() for path in told.paths] == [True, True, False, False, False]
    told.paths[1].unlink()  # as if it had been killed between the files of the first batch
    pipeline.calls = ()
    generate_to(tmp_path / "told", pipeline, prompts, seeds, SETTINGS, **options)
    assert pipeline.calls == (2, 2, 1)
    assert [path.read_bytes() for path in told.paths] == [path.read_bytes() for path in whole.paths]
    assert not (tmp_path / "told" / ".drawing.json").exists()


def _noted(pipeline, draw, prompt, **options):
    pipeline.calls = (*pipeline.calls, len(prompt))
    return draw(prompt, **options)


@pytest.mark.parametrize("kind", ["truncated", "a flipped bit", "empty", "another file"])
def test_a_damaged_picture_is_drawn_again(pipeline, tmp_path, kind):
    options = {"identity": "m", "progress": False}
    first = generate_to(tmp_path, pipeline, PROMPTS, [4, 5, 6], SETTINGS, **options)
    whole = [path.read_bytes() for path in first.paths]
    content = bytearray(whole[2])
    content[len(content) // 2] ^= 1
    kinds = {"truncated": whole[2][:-5], "a flipped bit": content, "empty": b"", "another file": b"GIF89a" * 9}
    first.paths[2].write_bytes(kinds[kind])
    pipeline.calls = ()
    generate_to(tmp_path, pipeline, PROMPTS, [4, 5, 6], SETTINGS, **options)
    assert pipeline.calls == (1,)
    assert [path.read_bytes() for path in first.paths] == whole


def test_a_folder_can_be_extended(pipeline, tmp_path):
    generate_to(tmp_path, pipeline, PROMPTS[:1], [4], SETTINGS, identity="m", progress=False)
    pipeline.calls = ()
    more = generate_to(tmp_path, pipeline, PROMPTS[:2], [4, 5], SETTINGS, identity="m", progress=False)
    assert pipeline.calls == (1,)
    assert more.images.keys() == {(0, 4), (1, 5)}
    generate_to(tmp_path, pipeline, PROMPTS[:1], [4], SETTINGS, identity="m", progress=False)
    assert len(Manifest.read(tmp_path).table) == 2


def test_another_batch_size_is_the_same_request(pipeline, tmp_path):
    generate_to(tmp_path, pipeline, PROMPTS[:1], [4], SETTINGS, identity="m", progress=False)
    other = SamplingSettings(num_inference_steps=2, guidance_scale=3.0, batch_size=5)
    generate_to(tmp_path, pipeline, PROMPTS[:1], [4], other, identity="m", progress=False)
    assert pipeline.calls == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity": "other"}, r'pictures of "m", not of "other"'),
        ({"settings": SamplingSettings(num_inference_steps=2, guidance_scale=7.5)}, r"guidance_scale = 3\.0.*7\.5"),
        ({"prompts": ["a white moon"]}, r"Prompt 0 is 'a red circle'.*'a white moon'"),
    ],
)
def test_a_folder_of_something_else_is_refused(pipeline, tmp_path, changes, message):
    request = {"prompts": PROMPTS[:1], "seeds": [4], "settings": SETTINGS, "identity": "m", "progress": False}
    generate_to(tmp_path, pipeline, **request)
    with pytest.raises(DataError, match=message):
        generate_to(tmp_path, pipeline, **{**request, **changes})


def test_a_changed_scheduler_is_noticed(pipeline, tmp_path):
    generate_to(tmp_path, pipeline, PROMPTS[:1], [4], SETTINGS, identity="m", progress=False)
    config = {**pipeline.scheduler.config, "timestep_spacing": "trailing", "steps_offset": 0}
    pipeline.scheduler = type(pipeline.scheduler).from_config(config)
    with pytest.raises(DataError, match="scheduler"):
        generate_to(tmp_path, pipeline, PROMPTS[:1], [4], SETTINGS, identity="m", progress=False)


def test_models_are_comparable_only_with_the_same_pictures(pipeline, tmp_path):
    options = {"identity": "m", "progress": False}
    one = generate_to(tmp_path / "a", pipeline, PROMPTS[:2], [4, 5], SETTINGS, **options)
    same = generate_to(tmp_path / "b", pipeline, PROMPTS[:2], [4, 5], SETTINGS, **options)
    fewer = generate_to(tmp_path / "c", pipeline, PROMPTS[:1], [4], SETTINGS, **options)
    one.require_comparable(same)
    with pytest.raises(DataError, match=r"prompt 1 with seed 5"):
        one.require_comparable(fewer)


def test_repeated_pictures_and_uneven_lists(pipeline, tmp_path):
    with pytest.raises(DataError, match="repeat a prompt and seed"):
        generate_to(tmp_path, pipeline, [PROMPTS[0]] * 2, [4, 4], SETTINGS, identity="m", progress=False)
    with pytest.raises(DataError, match="3 prompts but 1 seeds"):
        generate(pipeline, PROMPTS, [0], SETTINGS, progress=False)


def test_a_missing_or_foreign_manifest(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a manifest"):
        Manifest.read(tmp_path)


def test_prompt_plan_gives_every_picture_its_own_seed():
    ids, prompts, seeds = prompt_plan(["a", "b"], images_per_prompt=2, seed=10)
    assert (ids, prompts, seeds) == ([0, 0, 1, 1], ["a", "a", "b", "b"], [10, 11, 12, 13])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"height": 100}, "multiple of 8, got 100. Try 96"),
        ({"guidance_scale": -1.0}, "at least 0, got -1"),
        ({"guidance_scale": float("nan")}, "at least 0, got nan"),
    ],
)
def test_settings_no_pipeline_can_draw_with(options, message):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**options)
