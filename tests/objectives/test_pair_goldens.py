"""Objectives of pairs against numbers of the official code, or of the library statements they are taken from."""

import pytest
from torch import tensor

from diffalign.objectives import load
from tests import golden
from tests.objectives.records import RECORDS, assert_loss_and_gradients, golden_errors

BY_LOGIT_GAIN = {"beta": 5000.0}  # the records' b = 2500 is beta/2
CASES = {
    "inpo_{c}_b2000": ("inpo", {"beta": 2000.0}),
    "dcpo_{c}_b500": ("dcpo", {"beta": 500.0}),
    "npo_offline_{c}": ("npo", {"beta": 1000.0}),  # the script has no factor 1/2
    "dmpo_{c}_b2000_a0.01": ("dmpo", {"beta": 2000.0, "alpha": 0.01}),
    "dmpo_{c}_b2000_a0.1": ("dmpo", {"beta": 2000.0, "alpha": 0.1}),
    "exo_pair_{c}": ("dmpo", BY_LOGIT_GAIN | {"alpha": 0.1}),
    "nca_pair_{c}": ("nca", BY_LOGIT_GAIN),
    "sppo_hard_scaled_{c}": ("sppo", BY_LOGIT_GAIN),
    "apo_zero_{c}": ("apo", BY_LOGIT_GAIN),
    "apo_down_{c}": ("apo", BY_LOGIT_GAIN | {"variant": "down"}),
    "sigmoid_{c}": ("fdpo", BY_LOGIT_GAIN | {"divergence": "reverse_kl"}),
    "fdpo_forward_kl_{c}": ("fdpo", BY_LOGIT_GAIN | {"divergence": "forward_kl"}),
    "fdpo_js_{c}": ("fdpo", BY_LOGIT_GAIN),
    "fdpo_alpha_{c}": ("fdpo", BY_LOGIT_GAIN | {"divergence": "alpha", "alpha": 0.5}),
    "simpo_margin0_{c}": ("simpo", BY_LOGIT_GAIN | {"target_margin": 0.0}),
    "simpo_margin0.5_{c}": ("simpo", BY_LOGIT_GAIN),
    "cpo_{c}": ("cpo", BY_LOGIT_GAIN),
}
RUNS = [(pattern.format(c=c), *case) for pattern, case in CASES.items() for c in ("c1", "c2")]


@pytest.mark.parametrize(("name", "objective", "hyperparameters"), [run for run in RUNS if run[0] in RECORDS])
def test_loss_and_gradients(name, objective, hyperparameters):
    assert_loss_and_gradients(RECORDS[name], load(objective, **hyperparameters))


def test_every_record_is_found():
    assert [run[0] for run in RUNS if run[0] not in RECORDS] == ["inpo_c2_b2000"]


@pytest.mark.parametrize("shift", ["0", "0.35"])
@pytest.mark.parametrize("case", ["c1", "c2"])
def test_bco_with_a_given_shift(case, shift):
    record = RECORDS[f"bco_pair_delta{shift}_{case}"]
    assert_loss_and_gradients(record, load("bco", **BY_LOGIT_GAIN), statistic=tensor(float(shift)))


@pytest.mark.parametrize("case", ["c1", "c2"])
def test_bco_without_a_shift_is_trls_pair_form(case):
    assert load("bco", shift="zero").statistic(golden_errors(RECORDS[f"bco_pair_{case}"])[0]) is None
    assert_loss_and_gradients(RECORDS[f"bco_pair_{case}"], load("bco", shift="zero", **BY_LOGIT_GAIN))


def test_bco_shifts_by_the_mean_reward_of_the_batch():
    bco, (errors, _) = load("bco", **BY_LOGIT_GAIN), golden_errors(RECORDS["bco_pair_c1"])
    rewards = [
        2500 * (r - m) for r, m in [(errors.reference_w, errors.policy_w), (errors.reference_l, errors.policy_l)]
    ]
    shift = (rewards[0] + rewards[1]).mean().item() / 2
    assert abs(shift) > 0.1
    given, _ = golden_errors(RECORDS["bco_pair_c1"], statistic=tensor(shift))
    assert bco.loss(errors).tolist() == pytest.approx(bco.loss(given).tolist(), rel=1e-6)
    assert not bco.statistic(errors).requires_grad


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("smpo_loss_")])
def test_smpo_with_one_probability(name):
    record = RECORDS[name]
    p = tensor([record["hyperparameters"]["p"]] * len(record["inputs"]["m_w"]))
    assert_loss_and_gradients(record, load("smpo", beta=2000.0), preference=p)


@pytest.mark.parametrize("case", ["c1", "c2"])
def test_smpo_with_a_probability_each(case):
    record = RECORDS[f"smpo_vectorised_{case}"]
    inputs = {key: value for key, value in record["inputs"].items() if key != "p"}
    smpo, p = load("smpo", beta=2000.0), tensor(record["inputs"]["p"])
    errors, _ = golden_errors(record | {"inputs": inputs}, preference=p)
    golden.assert_close(record, "logit", smpo.logit(errors))
    assert_loss_and_gradients(record | {"inputs": inputs}, smpo, preference=p)


def test_smpo_factor_of_the_authors_scores():
    record = RECORDS["smpo_probability"]
    factor = 10 * (2 * tensor(record["expected"]["p"]) - 1)
    golden.assert_close(record, "factor", factor)
