"""Whole training runs on a random-weight tiny SDXL: what they leave, and that equal runs leave equal weights."""

import copy
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffalign.backbones import loading
from diffalign.backbones.export import load_adapter_into
from diffalign.backbones.files import LORA_FILE, read_header
from diffalign.errors import UserError
from diffalign.evaluation import SamplingSettings, generate
from diffalign.training import metrics
from tests.jobs.material import as_it_was

STEPS = SamplingSettings(num_inference_steps=3, guidance_scale=3.0)


def variant(content, tmp_path, name, **sections):
    """Return a copy of a configuration with other values and an output folder of its own."""
    changed = copy.deepcopy(content)
    for section, values in sections.items():
        changed[section] = {**changed.get(section, {}), **values}
    changed["train"]["output_dir"] = str(tmp_path / name)
    return changed


def weights(content, step=4):
    (file,) = (Path(content["train"]["output_dir"]) / f"checkpoint-{step}").glob("*.safetensors")
    return load_file(file)


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_close(first, second):
    # The bulk agrees to rounding; AdamW turns rounding of a gradient near zero into a visible step here and there.
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=2e-2, atol=2e-4, msg=name)
    moved = max(tensor.abs().max().item() for name, tensor in first.items() if "lora_B" in name)
    assert moved > 1e-3  # not trivially equal


def distance(first, second):
    """Return how far weights lie apart on average."""
    return torch.cat([(first[name] - second[name]).abs().flatten() for name in first]).mean().item()


class TestLora:
    def test_it_leaves_what_users_expect(self, content, run):
        line = run(content)
        output = Path(content["train"]["output_dir"])
        left = {path.name for path in output.iterdir()}
        assert left >= {"pytorch_lora_weights.safetensors", "README.md", "config.yaml", "environment.json"}
        assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
        assert not list(output.glob(".*.partial"))
        assert json.loads((output / "environment.json").read_text())["identity"]["objective"]["name"] == "dpo"
        lines = metrics.read(output / "metrics.jsonl")
        assert [row["step"] for row in lines] == [1, 2, 3, 4]
        assert lines[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert lines[0]["margin"] == 0.0
        assert lines[0]["implicit_accuracy"] == 0.5
        assert line["loss"] != pytest.approx(0.6931472, abs=1e-5)
        wanted = {"chosen_drift", "rejected_drift", "grad_norm", "saturation", "pairs_per_second", "peak_memory_gib"}
        assert wanted <= line.keys()

    def test_the_export_draws_other_pictures_than_the_base(self, content, run, tiny_sdxl):
        run(content)
        pipeline = loading.load(tiny_sdxl).pipeline()
        before = generate(pipeline, ["a red circle"], [0], STEPS, progress=False)[0]
        load_adapter_into(pipeline, content["train"]["output_dir"])
        after = generate(pipeline, ["a red circle"], [0], STEPS, progress=False)[0]
        assert before.tobytes() != after.tobytes()

    def test_stock_diffusers_loads_the_checkpoints(self, content, run, tiny_sdxl):
        run(content)
        output = Path(content["train"]["output_dir"])
        drawn = []
        for folder in (output / "checkpoint-2", output / "checkpoint-4", output):
            pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
            pipeline.load_lora_weights(folder)
            drawn.append(generate(pipeline, ["a red circle"], [0], STEPS, progress=False)[0].tobytes())
        assert drawn[0] != drawn[1]
        assert drawn[1] == drawn[2]
        files = [read_header(folder / LORA_FILE)["__metadata__"] for folder in (output / "checkpoint-2", output)]
        assert [said.pop("training_steps") for said in files] == ["2", "4"]
        assert files[0] == files[1]
        assert files[0]["objective"] == "dpo"

    def test_kohya_export_if_asked_for(self, content, run):
        content["lora"]["export_kohya"] = True
        run(content)
        tensors = load_file(Path(content["train"]["output_dir"]) / "kohya" / "run.safetensors")
        assert any(name.startswith("lora_unet_") and name.endswith(".alpha") for name in tensors)


class TestEqualRuns:
    def test_the_same_run_twice_leaves_the_same_bits(self, content, run, tmp_path):
        first, second = (variant(content, tmp_path, name) for name in ("a", "b"))
        run(first)
        run(second)
        assert_same_bits(weights(first), weights(second))

    @pytest.mark.parametrize("tune", ["lora", "full"])
    def test_resumed_is_uninterrupted(self, content, run, tmp_path, tune):
        sections = {"model": {"tune": tune}, "optimizer": {"learning_rate": 1e-4, "use_ema": True}}
        whole = variant(content, tmp_path, "whole", **sections)
        halves = variant(content, tmp_path, "halves", **sections)
        run(whole)
        halves["train"]["max_train_steps"] = 2
        run(halves)
        halves["train"] |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
        run(halves)
        assert_same_bits(weights(whole), weights(halves))
        exported = "pytorch_lora_weights.safetensors" if tune == "lora" else "unet/diffusion_pytorch_model.safetensors"
        paths = [Path(c["train"]["output_dir"]) / exported for c in (whole, halves)]
        assert_same_bits(*map(load_file, paths))

    def test_output_may_change_on_resume(self, content, run, tmp_path):
        whole, halves = (variant(content, tmp_path, name) for name in ("whole", "halves"))
        run(whole)
        halves["train"]["max_train_steps"] = 2
        run(halves)
        folder = (tmp_path / "halves").rename(tmp_path / "moved") / "checkpoint-2"
        state = json.loads((as_it_was(folder) / "state.json").read_text())
        state["identity"]["lora"]["export_kohya"] = False  # was compared once
        (folder / "state.json").write_text(json.dumps(state))
        halves["train"] |= {
            "output_dir": str(tmp_path / "moved"),
            "max_train_steps": 4,
            "checkpointing_steps": 1,
            "checkpoints_total_limit": 1,
            "resume_from_checkpoint": "latest",
        }
        halves["lora"]["export_kohya"] = True
        halves["logging"] = {"logging_steps": 2, "report_to": ["tensorboard"]}
        halves["validation"] = {"validation_steps": 2, "validation_prompts": ["a red circle"], "num_inference_steps": 1}
        run(halves)
        assert_same_bits(weights(whole), weights(halves))
        assert [path.name for path in (tmp_path / "moved").glob("checkpoint-*")] == ["checkpoint-4"]
        assert (tmp_path / "moved" / "kohya" / "moved.safetensors").is_file()
        (grid,) = (tmp_path / "moved" / "validation").iterdir()
        (events,) = (tmp_path / "moved" / "diffalign").glob("events.out.tfevents.*")
        shown = EventAccumulator(str(events), {"images": 0}).Reload().Images("validation")
        assert [picture.step for picture in shown] == [4]
        (picture,) = (Image.open(io.BytesIO(picture.encoded_image_string)) for picture in shown)
        assert picture.convert("RGB").tobytes() == Image.open(grid).convert("RGB").tobytes()

    def test_accumulation_equals_the_large_batch(self, content, run, tmp_path):
        large = variant(content, tmp_path, "large")
        split = variant(content, tmp_path, "split", train={"train_batch_size": 1, "gradient_accumulation_steps": 4})
        run(large)
        run(split)
        assert_close(weights(large), weights(split))

    def test_an_example_that_comes_again_in_a_step_is_drawn_for_anew(self, content, run, tmp_path):
        """One pair, or its rows listed twice: a step of four has four draws, however it is cut and encoded."""
        short = {"max_train_steps": 2}
        one = {"max_train_samples": 1, "cache_dtype": "float32", "proportion_empty_prompts": 0}
        alone = variant(content, tmp_path, "alone", data=one, train=short | {"train_batch_size": 1})
        large = variant(content, tmp_path, "large", data=one, train=short)
        accumulated = short | {"train_batch_size": 1, "gradient_accumulation_steps": 4}
        split = variant(content, tmp_path, "split", data=one | {"cache_latents": False}, train=accumulated)
        row = pq.read_table(Path(content["data"]["train_data_dir"]) / "train.parquet").slice(0, 1)
        (tmp_path / "listed").mkdir()
        pq.write_table(pa.concat_tables([row] * 4), tmp_path / "listed" / "train.parquet")
        listed = one | {"train_data_dir": str(tmp_path / "listed"), "max_train_samples": None, "cache_latents": False}
        listed = variant(content, tmp_path, "listed-run", data=listed, train=short)
        for each in (alone, large, split, listed):
            run(each)
        trained = weights(large, 2)
        assert distance(trained, weights(split, 2)) < 1e-6
        assert distance(trained, weights(listed, 2)) < 1e-6
        assert distance(trained, weights(alone, 2)) > 1e-3

    def test_gradient_checkpointing_changes_nothing(self, content, run, tmp_path):
        plain = variant(content, tmp_path, "plain")
        checkpointed = variant(content, tmp_path, "checkpointed", train={"gradient_checkpointing": True})
        run(plain)
        run(checkpointed)
        assert_close(weights(plain), weights(checkpointed))

    def test_encoding_online_equals_the_cache(self, content, run, tmp_path):
        cached = variant(content, tmp_path, "cached", data={"cache_dtype": "float32"})
        online = variant(content, tmp_path, "online", data={"cache_latents": False, "cache_dtype": "float32"})
        run(cached)
        run(online)
        assert_close(weights(cached), weights(online))

    def test_another_seed_is_another_run(self, content, run, tmp_path):
        first, second = (variant(content, tmp_path, str(seed), train={"seed": seed}) for seed in (0, 1))
        run(first)
        run(second)
        different = [name for name, t in weights(first).items() if not torch.equal(t, weights(second)[name])]
        assert different


class TestVariants:
    def test_full_fine_tuning_exports_a_unet(self, content, run, tmp_path):
        full = variant(content, tmp_path, "full", model={"tune": "full"}, optimizer={"learning_rate": 1e-5})
        line = run(full)
        first = metrics.read(tmp_path / "full" / "metrics.jsonl")[0]
        assert first["margin"] == 0.0  # the frozen copy sees the same bits
        assert line["chosen_drift"] != 0.0
        assert (tmp_path / "full" / "unet" / "config.json").is_file()

    def test_bf16_starts_at_a_logit_of_exactly_zero(self, content, run, tmp_path):
        for tune in ("lora", "full"):
            half = variant(content, tmp_path, tune, model={"tune": tune}, train={"mixed_precision": "bf16"})
            run(half)
            assert metrics.read(tmp_path / tune / "metrics.jsonl")[0]["margin"] == 0.0

    def test_sft_looks_at_winners_only(self, content, run):
        content["objective"] = {"name": "sft"}
        line = run(content)
        assert "implicit_accuracy" not in line
        assert line["loss"] == pytest.approx(line["policy_error"])

    def test_sd15(self, content, run, tiny_sd15):
        content["model"]["pretrained_model_name_or_path"] = str(tiny_sd15)
        assert run(content)["grad_norm"] > 0

    def test_validation_draws_grids(self, content, run):
        content["validation"] = {
            "validation_steps": 2,
            "validation_prompts": "a red circle",
            "num_inference_steps": 2,
        }
        run(content)
        grids = sorted((Path(content["train"]["output_dir"]) / "validation").iterdir())
        assert [grid.name for grid in grids] == ["step-000002.png", "step-000004.png"]

    def test_without_a_terminal_every_logging_step_is_a_line(self, content, run, capsys):
        content["logging"] = {"logging_steps": 2, "report_to": ["tensorboard"]}
        run(content)
        assert list(Path(content["train"]["output_dir"]).rglob("events.out.tfevents.*"))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
        wanted = r"step {}/4  loss \d\.\d{{4}}  accuracy \d\.\d\d  \d+\.\d pairs/s  {}"
        assert re.fullmatch(wanted.format(2, r"\d:\d\d left"), lines[0])
        assert re.fullmatch(wanted.format(4, r"in \d:\d\d"), lines[1])
        assert len(lines) == 2


class TestRefusals:
    def test_xformers_without_a_gpu(self, content, run):
        content["train"]["enable_xformers_memory_efficient_attention"] = True
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(UserError, match="enable_xformers_memory_efficient_attention cannot be used here"):
            run(content)

    def test_resuming_under_other_conditions_names_them(self, content, run):
        run(content)
        content["objective"]["beta"] = 500.0
        content["train"] |= {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
        with pytest.raises(UserError, match=r"objective\.beta: 2000\.0 there, 500\.0 now"):
            run(content)

    def test_resuming_with_other_data_is_refused(self, content, run, tmp_path):
        from tests.e2e.pairs import write_pairs

        run(content)
        content["data"]["train_data_dir"] = str(write_pairs(tmp_path / "other", 12))
        content["train"] |= {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
        with pytest.raises(UserError, match=r"data\.content"):
            run(content)
