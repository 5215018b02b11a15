"""Faults that have been made before, by others or by us: each is put into a copy of the code, and tests must fail.

A fault that stays unnoticed means that a test is missing, not that the entry should go.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTIVES, DENOISING = "tests/objectives", "tests/denoising"
GOLDENS = f"{OBJECTIVES}/test_pair_goldens.py"

# name: (file below diffalign/, text, what it becomes, tests that must notice)
FAULTS = {
    "the factor 1/2 of the DPO logit is lost": (
        "objectives/base.py", "return self.beta / 2 * errors.margin", "return self.beta * errors.margin",
        f"{OBJECTIVES}/test_dpo.py",
    ),
    "the sign of the margin is swapped": (
        "objectives/base.py", "return log_ratio_w - log_ratio_l", "return log_ratio_l - log_ratio_w",
        f"{OBJECTIVES}/test_dpo.py",
    ),
    "a log of a sigmoid instead of a log-sigmoid": (
        "objectives/dpo.py", "-F.logsigmoid(logit)", "-logit.sigmoid().log()", "tests/properties/test_objectives.py",
    ),
    "errors are reduced in float16": (
        "denoising/kernels/errors.py", "target.to(_wide(pred, target))", "target.to(pred.dtype)",
        f"{DENOISING}/test_step.py",
    ),
    "the probability of the first pair is used for all": (
        "objectives/smpo.py", "errors.preference - 1", "errors.preference[0] - 1", GOLDENS,
    ),
    "adapters stay on in the reference pass": (
        "denoising/frozen.py", "return self.frozen_weights(self.denoiser) if self.frozen_weights else nullcontext()",
        "return nullcontext()", f"{DENOISING}/test_frozen.py",
    ),
    "the reference pass records gradients": (
        "denoising/frozen.py", "torch.no_grad(), self._weights()", "self._weights()", f"{DENOISING}/test_frozen.py",
    ),
    "winner and loser get different noise": (
        "denoising/noising.py", "noise = normal(seed, step, example_ids, x0.shape[1:]).repeat(images, "
        "*(1 for _ in x0.shape[1:]))", 'noise = per_image(seed, step, example_ids, x0, "noise")',
        f"{DENOISING}/test_noising.py",
    ),
    "noise does not depend on the step": (
        "denoising/draws.py", "torch.full_like(block, step)", "torch.full_like(block, 0)", f"{DENOISING}/test_draws.py",
    ),
    "MaPO without its series for small errors": (
        "objectives/mapo.py", "small = z < SERIES_BELOW", "small = z < 0", f"{OBJECTIVES}/test_mapo.py",
    ),
    "the KTO baseline carries a gradient": (
        "objectives/kto.py", "log_ratio = errors.log_ratio.detach()", "log_ratio = errors.log_ratio",
        f"{OBJECTIVES}/test_kto.py",
    ),
    "the KTO baseline may be negative": (
        "objectives/kto.py", 'baseline.clamp(min=0.0) if self.baseline == "batch" else baseline', "baseline",
        f"{OBJECTIVES}/test_kto.py",
    ),
    "undesirable images get the weight of desirable ones": (
        "objectives/kto.py", "self.lambda_desirable, self.lambda_undesirable)",
        "self.lambda_desirable, self.lambda_desirable)", f"{OBJECTIVES}/test_kto.py",
    ),
    "lists are ranked from worst to best": (
        "objectives/rankdpo.py", "descending=True", "descending=False", f"{OBJECTIVES}/test_rankdpo.py",
    ),
    "equal scores of a list are trained on": (
        "objectives/rankdpo.py", "importance * (scores[:, :, None] > scores[:, None])", "importance",
        f"{OBJECTIVES}/test_rankdpo.py",
    ),
    "the weight of Linear-DPO carries a gradient": (
        "objectives/linear_dpo.py", "self.logit(errors).detach()", "self.logit(errors)",
        f"{OBJECTIVES}/test_linear_dpo.py",
    ),
    "the strength of PNAPO falls to 0": (
        "objectives/pnapo.py", "self.end + (1 - self.end) * ", "", f"{OBJECTIVES}/test_pnapo.py",
    ),
    "the noise of a picture is drawn in another type and cast": (
        "denoising/initial_noise.py", "dtype=TYPES[self.dtype]), side)", "), side)",
        f"{DENOISING}/test_initial_noise.py",
    ),
    "an image of a ranking competes with those above it": (
        "objectives/plackett_luce.py", "errors.scores[:, None] < ", "errors.scores[:, None] > ",
        f"{OBJECTIVES}/test_plackett_luce.py",
    ),
    "the loser scale of SDPO exceeds 1": (
        "objectives/sdpo.py", "ratio.clamp(max=1.0)", "ratio", f"{OBJECTIVES}/test_changed_gradients.py",
    ),
    "the weight of DSPO is detached": (
        "objectives/dspo.py", "self.logit(errors)).exp()", "self.logit(errors)).exp().detach()",
        f"{OBJECTIVES}/test_changed_gradients.py",
    ),
    "robust DPO is not divided by 1 - 2e": (
        "objectives/robust_dpo.py", "/ (1 - 2 * flip)", "", f"{OBJECTIVES}/test_dpo_family.py",
    ),
    "IPO aims at another margin": (
        "objectives/ipo.py", "(errors) - 0.5)", "(errors) - 1.0)", f"{OBJECTIVES}/test_dpo_family.py",
    ),
    "NPO learns what people want": (
        "objectives/npo.py", "F.logsigmoid(-self.logit(errors))", "F.logsigmoid(self.logit(errors))", GOLDENS,
    ),
    "the network is told the level it goes to": (
        "denoising/inversion.py", "predicted = [direction_at(start, here)]", "predicted = [direction_at(start, there)]",
        f"{DENOISING}/test_inversion.py",
    ),
    "the clean image counts as timestep 0": (
        "denoising/ddpm_path.py", "torch.where(timesteps < 0, torch.ones_like(abar), abar)", "abar",
        f"{DENOISING}/test_inversion.py",
    ),
    "images that have arrived are inverted on": (
        "denoising/inversion.py", "(hops.count > step)", "(hops.count > -1)", f"{DENOISING}/test_inversion.py",
    ),
    "the inversion ends before its timestep": (
        "denoising/inversion.py", "if 0 < level < t), t]", "if 0 < level < t)]", f"{DENOISING}/test_inversion.py",
    ),
    "v is weighted as epsilon": (
        "denoising/ddpm_path.py", "return torch.minimum(signal, gamma * noise) / (signal + noise)",
        "return (gamma * noise / signal).clamp(max=1.0)", f"{DENOISING}/test_weighting.py",
    ),
    "the target of a flow points to the picture": (
        "denoising/flow_path.py", "return -one, one", "return one, -one", f"{DENOISING}/test_flow_path.py",
    ),
    "a flow level is rounded before it is taken from 1": (
        "denoising/flow_path.py", "(TIMESTEPS - time) / TIMESTEPS", "1 - time / TIMESTEPS",
        f"{DENOISING}/test_flow_path.py",
    ),
    "errors of velocity are weighted as those of v": (
        "denoising/flow_path.py", "gamma * sigma.square())", "gamma * sigma.square()) / (alpha**2 + sigma**2)",
        f"{DENOISING}/test_flow_path.py",
    ),
    "the window of timesteps holds before the shift": (
        "denoising/densities.py", "shift.inverse(end / total)", "(end / total)", f"{DENOISING}/test_densities.py",
    ),
    "a shift goes towards the picture": (
        "denoising/shifts.py", "factor * level / (1 + (factor - 1) * level)",
        "level / (factor + (1 - factor) * level)", f"{DENOISING}/test_shifts.py",
    ),
    "an inversion goes down the flow": (
        "denoising/flow_path.py", "x + (destination - source)", "x - (destination - source)",
        f"{DENOISING}/test_flow_inversion.py",
    ),
    "the moving reference moves by its decay": (
        "training/moving_reference.py", "1 - self.decay)", "self.decay)", "tests/training/test_moving_reference.py",
    ),
    "the policy keeps the weights of the reference": (
        "training/moving_reference.py", "        finally:\n            self._exchange()",
        "        finally:\n            pass", "tests/training/test_moving_reference.py",
    ),
    "beta follows the margin instead of its inverse": (
        "training/auto_beta.py", "-2 * self.logit / self.average", "-2 * self.logit * self.average",
        "tests/training/test_auto_beta.py",
    ),
    "the log-probability of a step is summed": (
        "denoising/ddim.py", "residual.square().flatten(1).mean(1)", "residual.square().flatten(1).sum(1)",
        f"{DENOISING}/test_ddim.py",
    ),
    "a log-probability is taken before the latent is rounded": (
        "denoising/ddim.py", "* noise.float()).to(dtype).float()", "* noise.float())", f"{DENOISING}/test_ddim.py",
    ),
    "gradient flows through the unconditional branch no more": (
        "denoising/ddim.py", "return without + guidance_scale", "return without.detach() + guidance_scale",
        f"{DENOISING}/test_ddim.py",
    ),
    "winner and loser of a step are exchanged": (
        "rollout/selection.py", "scores.max(0), scores.min(0)", "scores.min(0), scores.max(0)",
        "tests/rollout/test_selection_and_advantages.py",
    ),
    "a ratio outside the clip keeps its gradient": (
        "objectives/base.py", "(ratio.clamp(low, high) for ratio in transitions.log_ratios)",
        "transitions.log_ratios", "tests/rollout/test_selection_and_advantages.py",
    ),
    "PPO takes the better of clipped and unclipped": (
        "objectives/ddpo.py", "torch.maximum(", "torch.minimum(", "tests/rollout/test_selection_and_advantages.py",
    ),
    "DPOK flees what was rewarded": (
        "objectives/dpok.py", "- self.reward_weight", "+ self.reward_weight",
        "tests/rollout/test_selection_and_advantages.py",
    ),
    "trajectories that people judged are drawn with the policy": (
        "jobs/training/online.py", "    sampler.network = replace(", "    _ = replace(",
        "tests/e2e/test_human_labels.py",
    ),
    "a repeated draw is the same at every visit": (
        "data/visits.py", "return example_ids ^ changed.to(example_ids.device)", "return example_ids",
        "tests/data/test_visits.py",
    ),
    "an example that comes again in a step is drawn as before": (
        "data/visits.py", "if times == 0:", "if True:", "tests/data/test_visits.py",
    ),
    "a recorded micro-step keeps the inputs of its recording": (
        "training/static_step.py", "held.copy_(given)", "pass", "tests/training/test_static_step.py",
    ),
    "the next replay overwrites the losses of the last": (
        "training/static_step.py", "losses.clone(), {", "losses, {", "tests/training/test_static_step.py",
    ),
    "scores are copied to the device while the host waits": (
        "training/preference_step.py", "torch.arange(1.0, -1.0, -1.0, device", "torch.tensor([1.0, 0.0], device",
        "tests/training/test_no_host_sync.py",
    ),
    "stored errors of winner and loser are exchanged": (
        "training/reference_cache.py", "known.T.reshape(-1)", "known[:, ::-1].T.reshape(-1)",
        "tests/training/test_reference_cache.py::TestFile",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run all faults in a copy of the code and return the exit code of the tests by fault; "" is no fault."""
    folder = tmp_path_factory.mktemp("mutant")
    for part in ("diffalign", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for part in ("assets", "configs"):
        (folder / part).symlink_to(ROOT / part)
    everything = sorted({fault[3] for fault in FAULTS.values()})
    (folder / "faults.json").write_text(json.dumps({"": [None, None, None, everything], **FAULTS}), encoding="utf8")
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    runner = [sys.executable, str(Path(__file__).with_name("runner.py"))]
    done = subprocess.run(runner, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "outcomes.json").read_text(encoding="utf8"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_caught(name, outcomes):
    file, text, _, tests = FAULTS[name]
    assert (ROOT / "diffalign" / file).read_text(encoding="utf8").count(text) == 1, f"{file} has changed: update this"
    code, output = outcomes[name]
    # 1: tests failed. Anything else, such as 2 for an import error, would prove nothing.
    assert code == 1, f"{tests} did not notice (exit code {code}):\n{output}"


def test_the_copy_passes_without_a_fault(outcomes):
    code, output = outcomes[""]
    assert code == 0, output
