"""The reference's errors: kept in a file that cannot be wrong, and as good as evaluating the reference again."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from diffalign import config as configuration
from diffalign.data.visits import Visit
from diffalign.errors import DataError
from diffalign.jobs.training import assemble, examples, networks, reference_errors
from diffalign.training.reference_cache import ReferenceCache
from tests.e2e.pairs import write_lists, write_pairs

IDENTITY = {"seed": 0}
VISITS = [Visit(3, 0), Visit(1, 1), Visit(4, 0)]


def numbers(rows):
    return rows.float() + 1


class TestFile:
    def test_what_was_computed_is_found_by_the_next_process(self, tmp_path):
        found, hits = ReferenceCache.open(tmp_path, IDENTITY, (2, 5, 2)).errors(VISITS, numbers)
        assert found.tolist() == [1, 2, 3, 4, 5, 6]
        assert hits.tolist() == [0, 0, 0]
        again = ReferenceCache.open(tmp_path, IDENTITY, (2, 5, 2))
        found, hits = again.errors(VISITS[::-1], None)  # evaluates nothing
        assert found.tolist() == [3, 2, 1, 6, 5, 4]
        assert hits.tolist() == [1, 1, 1]
        assert not again.complete
        assert [(v, v.draw) for v in again.unknown()][:3] == [(0, 0), (1, 0), (2, 0)]
        assert len(again.unknown()) == 7

    def test_only_rows_that_are_not_known_are_evaluated(self, tmp_path):
        cache = ReferenceCache.open(tmp_path, IDENTITY, (2, 5, 3))
        cache.errors(VISITS[:2], numbers)
        asked = []
        found, hits = cache.errors(VISITS, lambda rows: asked.append(rows) or -rows.float())
        assert asked[0].tolist() == [2, 5, 8]  # the third example's images
        assert found.tolist() == [1, 2, -2, 3, 4, -5, 5, 6, -8]
        assert hits.tolist() == [1, 1, 0]

    def test_an_overflow_is_not_kept(self, tmp_path):
        cache = ReferenceCache.open(tmp_path, IDENTITY, (2, 5, 1))
        found, _ = cache.errors(VISITS, lambda rows: torch.tensor([1.0, float("inf"), 2.0]))
        assert found.isinf().sum() == 1
        assert cache.errors(VISITS, lambda rows: 7.0 * rows)[0].tolist() == [1, 7, 2]

    def test_another_identity_is_another_cache(self, tmp_path):
        ReferenceCache.open(tmp_path, IDENTITY, (2, 5, 2)).errors(VISITS, numbers)
        for identity, shape in [({"seed": 1}, (2, 5, 2)), (IDENTITY, (3, 5, 2))]:
            assert len(ReferenceCache.open(tmp_path, identity, shape).unknown()) == shape[0] * shape[1]
        kept = json.loads(next(tmp_path.glob("*/identity.json")).read_text())
        assert kept.keys() == {"format", "shape", "seed"}

    @pytest.mark.parametrize("damage", ["torn", "long", "no header", "other shape"])
    def test_a_damaged_file_is_reported_and_made_anew(self, tmp_path, damage):
        cache = ReferenceCache.open(tmp_path, IDENTITY, (2, 5, 2))
        cache.errors(VISITS, numbers)
        file = cache.folder / "errors.npy"
        content = file.read_bytes()
        if damage == "other shape":
            np.save(file, np.zeros((2, 5), dtype=np.float32))
        else:
            file.write_bytes({"torn": content[:-3], "long": content + b"x", "no header": b""}[damage])
        told = []
        again = ReferenceCache.open(tmp_path, IDENTITY, (2, 5, 2), told.append)
        assert len(again.unknown()) == 10
        assert "errors are computed again" in told[0]
        assert file.stat().st_size == len(content)

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(DataError, match="Choose another directory"):
            ReferenceCache.open(tmp_path / "file", IDENTITY, (1, 1, 1))


@dataclass
class Run:
    """Hold the parts of a run, its LoRA moved away from the reference."""

    config: configuration.Config
    backbone: object
    data: object
    reference: networks.Reference

    def step(self, directory, *overrides):
        """Build the training step with a cache of its own, for a configuration that shares the networks."""
        config = self.config.model_copy(update=dict(overrides))
        shape = 2, len(self.data), self.data.images_per_example
        stored = ReferenceCache.open(directory, IDENTITY, shape)
        return assemble.preference_step(config, self.backbone, self.data, self.reference, stored=stored)

    def losses(self, step, visits):
        return step(self.backbone.denoiser.train(), visits, 5)


def build(tiny, folder, cache_dir, objective):
    content = {
        "model": {"pretrained_model_name_or_path": str(tiny)},
        "lora": {"rank": 2},
        "data": {"train_data_dir": str(folder), "resolution": 64, "cache_dir": str(cache_dir),
                 "proportion_empty_prompts": 0.3},
        "objective": objective,
        "reference": {"cache_draws": 2},
        "train": {"train_batch_size": 4},
    }  # fmt: skip
    config = configuration.check(content)
    accelerator, console = Accelerator(cpu=True), Console(quiet=True)
    backbone = assemble.load_backbone(config)
    data = examples.open_examples(config, backbone, examples.open_source(config), accelerator, console)
    reference = networks.prepare_networks(config, backbone, accelerator)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return Run(config, backbone, data, reference)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def pairs(tiny_sdxl, caches):
    folder = write_pairs(caches / "pairs", 12)
    return build(tiny_sdxl, folder, caches, {"name": "dpo", "beta": 2000.0})


SHOWN = [Visit(0, 0), Visit(7, 1), Visit(2, 0), Visit(7, 0)]


class TestStep:
    def test_stored_errors_are_those_of_the_reference(self, pairs, tmp_path):
        step = pairs.step(tmp_path)
        posed = step.pose(step.load(SHOWN, 0), 0)
        outputs = step.reference(posed.problem.xt, posed.problem.timesteps, posed.cond)
        expected = (outputs - posed.problem.target).square().flatten(1).mean(1)
        step.fill(SHOWN)
        found, hits = step.stored.errors(SHOWN, None)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert hits.tolist() == [1, 1, 1, 1]
        assert found.unique().numel() == 8

    def test_a_hit_is_a_miss_without_the_reference(self, pairs, tmp_path, evaluated):
        step = pairs.step(tmp_path)
        missed, metrics = pairs.losses(step, SHOWN)
        assert evaluated == [8]
        assert metrics["reference_cache_hits"].tolist() == [0, 0, 0, 0]
        found, metrics = pairs.losses(step, SHOWN)
        assert evaluated == [8]
        assert metrics["reference_cache_hits"].tolist() == [1, 1, 1, 1]
        assert torch.equal(found, missed)
        assert found.requires_grad
        assert (missed - np.log(2)).abs().min() > 1e-3  # the policy has moved

    def test_errors_of_another_batch_size_agree_to_rounding(self, pairs, tmp_path):
        alone, together = pairs.step(tmp_path / "alone"), pairs.step(tmp_path / "together")
        for visit in SHOWN:
            alone.fill([visit])
        together.fill([Visit(index, draw) for index in range(10) for draw in range(2)])
        expected, _ = pairs.losses(pairs.step(tmp_path / "none"), SHOWN)
        for step in (alone, together):
            torch.testing.assert_close(pairs.losses(step, SHOWN)[0], expected, rtol=0, atol=1e-3)

    def test_a_mixed_batch_evaluates_what_it_misses(self, pairs, tmp_path, evaluated):
        step = pairs.step(tmp_path)
        step.fill(SHOWN[:3])
        evaluated.clear()
        loss, metrics = pairs.losses(step, SHOWN)
        assert evaluated == [2]
        assert metrics["reference_cache_hits"].tolist() == [1, 1, 1, 0]
        expected, _ = pairs.losses(pairs.step(tmp_path / "none"), SHOWN)
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-3)

    def test_the_step_does_not_matter_and_the_draw_does(self, pairs, tmp_path):
        step = pairs.step(tmp_path)
        first, later = (step.pose(step.load(SHOWN, 0), 0).problem for _ in range(2))
        assert torch.equal(first.xt, later.xt)
        assert torch.equal(step(pairs.backbone.denoiser, SHOWN, 1)[0], step(pairs.backbone.denoiser, SHOWN, 900)[0])
        other = step.pose(step.load([Visit(v, 1 - v.draw) for v in SHOWN], 0), 0).problem
        assert (first.noise != other.noise).flatten(1).any(1).all()
        assert not torch.equal(first.timesteps, other.timesteps)
        seven = [1, 3]  # the same pair twice, under two draws
        assert not torch.equal(*first.noise[seven])

    def test_another_objective_and_min_snr_share_the_errors(self, pairs, tmp_path, evaluated):
        pairs.losses(pairs.step(tmp_path), SHOWN)
        evaluated.clear()
        weighted = pairs.config.denoising.model_copy(update={"snr_weighting": "min_snr"})
        step = pairs.step(tmp_path, ("objective", {"name": "sdpo", "beta": 500.0}), ("denoising", weighted))
        loss, _ = pairs.losses(step, SHOWN)
        expected, _ = pairs.losses(replace(step, stored=pairs.step(tmp_path / "none").stored), SHOWN)
        assert torch.equal(loss, expected)
        assert evaluated == [8]  # of the other one
        plain = pairs.step(tmp_path, ("objective", {"name": "sdpo", "beta": 500.0}))
        assert not torch.equal(pairs.losses(plain, SHOWN)[0], loss)

    def test_the_policy_starts_at_a_logit_of_zero(self, pairs, tmp_path):
        step = pairs.step(tmp_path)
        step.fill([Visit(index, draw) for index in range(10) for draw in range(2)])
        with networks.adapters.adapters_off(pairs.backbone.denoiser):
            _, metrics = pairs.losses(step, SHOWN)
        assert (metrics["margin"] * 2000.0 / 2).abs().max() < 1e-3
        assert pairs.losses(step, SHOWN)[1]["margin"].abs().min() > 1e-6

    @pytest.mark.parametrize("kind", ["kto", "rankdpo"])
    def test_single_images_and_lists(self, tiny_sdxl, caches, tmp_path, evaluated, kind):
        if kind == "rankdpo":
            folder, images = write_lists(caches / kind, 8, 3), 3
        else:
            folder, images = caches / "pairs", 1
        run = build(tiny_sdxl, folder, caches, {"name": kind})
        shown = [Visit(0, 0), Visit(5, 1), Visit(2, 1)]
        missed, _ = run.losses(run.step(tmp_path), shown)
        found, metrics = run.losses(run.step(tmp_path), shown)
        assert evaluated == [3 * images]
        assert torch.equal(found, missed)
        assert metrics["reference_cache_hits"].tolist() == [1, 1, 1]
        assert (missed != missed[0]).any()


class TestIdentity:
    @pytest.fixture(scope="class")
    def open_with(self, tiny_sdxl, pairs):
        backbone = assemble.load_backbone(pairs.config)

        def of(**sections):
            content = pairs.config.model_dump(mode="json")
            for section, values in sections.items():
                content[section] = values if section == "objective" else {**content[section], **values}
            return reference_errors.identity(configuration.check(content), backbone, pairs.data)

        return of

    @pytest.mark.parametrize(
        "sections",
        [
            {"objective": {"name": "ipo"}},
            {"objective": {"name": "dpo", "beta": 10.0}},
            {"lora": {"rank": 16}},
            {"optimizer": {"learning_rate": 1e-6}},
            {"denoising": {"snr_weighting": "min_snr"}},
            {"train": {"train_batch_size": 1, "output_dir": "elsewhere"}},
        ],
    )
    def test_sweeps_share_it(self, open_with, sections):
        assert open_with(**sections) == open_with()

    @pytest.mark.parametrize(
        "sections",
        [
            {"train": {"seed": 1}},
            {"train": {"mixed_precision": "bf16"}},
            {"denoising": {"noising": "independent"}},
            {"denoising": {"timestep_low": 500}},
            {"data": {"proportion_empty_prompts": 0.2}},
            {"data": {"random_flip": False}},
        ],
    )
    def test_what_changes_the_errors_changes_it(self, open_with, sections):
        assert open_with(**sections) != open_with()

    def test_other_weights_and_other_labels_change_it(self, pairs, open_with, tiny_sdxl, tmp_path):
        backbone = assemble.load_backbone(pairs.config)
        known = open_with()
        with torch.no_grad():
            next(backbone.denoiser.parameters()).add_(1e-3)
        changed = reference_errors.identity(pairs.config, backbone, pairs.data)
        assert {key for key in known if known[key] != changed[key]} == {"denoiser"}
        flipped = examples.AnnotatedPairs(pairs.data, flip_labels=0.5)
        assert flipped.swapped.any()
        assert reference_errors.identity(pairs.config, backbone, flipped)["examples"] != known["examples"]
