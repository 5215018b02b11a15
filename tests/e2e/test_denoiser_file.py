"""Runs from a transformer in one file of the original layout: equal to those from its folder, told by the dry run."""

import pytest
import yaml

from diffalign.backbones import export, loading
from tests.backbones.drawing import perturb
from tests.backbones.original import write_original
from tests.e2e.test_training import assert_same_bits, variant, weights

FOLDERS = {"sd3": "tiny_sd3", "flux2": "tiny_klein", "qwen": "tiny_qwen", "zimage": "tiny_zimage"}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_run_from_a_file_is_to_the_bit_one_from_its_folder(content, run, request, tmp_path, family):
    folder = request.getfixturevalue(FOLDERS[family])
    denoiser = loading.load(folder).denoiser
    perturb(denoiser.parameters())
    export.save_denoiser(denoiser, tmp_path / "sft")
    file = write_original(family, denoiser, tmp_path / "sft.safetensors", "model.diffusion_model.")
    trained = {}
    for place in (file, tmp_path / "sft", None):
        model = {"pretrained_model_name_or_path": str(folder), "unet_init": place and str(place)}
        changed = variant(content, tmp_path, f"run-{len(trained)}", model=model, train={"max_train_steps": 2})
        run(changed)
        trained[place] = weights(changed, 2)
    assert_same_bits(trained[file], trained[tmp_path / "sft"])
    key = next(iter(trained[None]))
    assert not (trained[file][key] == trained[None][key]).all()


def test_the_commands_take_it(diffalign, tiny_zimage, content, tmp_path):
    file = write_original("zimage", loading.load(tiny_zimage).denoiser, tmp_path / "z.safetensors")
    asked = ("--prompt", "a red circle", "--height", 64, "--width", 64, "--steps", 2, "--out", tmp_path / "out")
    code, said = diffalign("generate", file, *asked)
    assert code == 2
    assert "a transformer of zimage with" in said
    assert "--base Tongyi-MAI/Z-Image" in said
    code, said = diffalign("generate", file, "--base", tiny_zimage, *asked)
    assert code == 0, said
    assert len(list((tmp_path / "out").rglob("*.png"))) == 1
    content["model"] = {"pretrained_model_name_or_path": str(tiny_zimage), "unet_init": str(file)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    code, said = diffalign("train", tmp_path / "run.yaml", "--dry-run")
    assert code == 0, said
    assert "in F32 by the header of z.safetensors" in said
