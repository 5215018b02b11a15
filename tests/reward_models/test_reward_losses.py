import pytest
import torch

from reward_models.losses import example_weights, hps_losses, pair_losses, pickscore_losses
from tests import golden

RECORDS = golden.load("rewards")


def inputs(record):
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in record["inputs"].items()}
    for name in ("image_0", "image_1", "text"):
        tensors[name].requires_grad_()
    return tensors, record["hyperparameters"]["logit_scale_exp"]


@pytest.mark.parametrize("record_id", ["pickscore_train_loss_pair", "pickscore_train_loss_inbatch"])
def test_pickscore_loss_and_gradients_match_the_official_criterion(record_id):
    record = RECORDS[record_id]
    given, scale = inputs(record)
    embeddings = given["image_0"], given["image_1"], given["text"]
    in_batch = record["hyperparameters"]["in_batch_negatives"]
    losses = pickscore_losses(*embeddings, scale, given["label_0"], in_batch_negatives=in_batch)
    loss = (example_weights(given["num_example_per_prompt"]) * losses).sum()
    loss.backward()
    golden.assert_close(record, "loss", loss)
    for name in ("image_0", "image_1", "text"):
        golden.assert_close(record, f"grad_{name}", given[name].grad)
    scores = [scale * (given["text"] * given[name]).sum(-1) for name in ("image_0", "image_1")]
    golden.assert_close(record, "score_0", scores[0])
    golden.assert_close(record, "score_1", scores[1])
    golden.assert_close(record, "per_example_pair_loss", pickscore_losses(*embeddings, scale, given["label_0"]))


def test_hps_loss_and_gradients_match_the_official_one():
    record = RECORDS["hps_train_loss"]
    given, scale = inputs(record)
    loss = hps_losses(given["image_0"], given["image_1"], given["text"], scale, given["label_0"]).sum()
    loss.backward()
    golden.assert_close(record, "loss", loss)
    golden.assert_close(record, "grad_image_0", given["image_0"].grad)
    golden.assert_close(record, "grad_image_1", given["image_1"].grad)


def test_losses_stay_finite_for_any_scores():
    scores = torch.tensor([0.0, 1e-12, 1.0, 1e4, -1e4], requires_grad=True)
    for label in (0.0, 0.5, 1.0):
        losses = pair_losses(scores, torch.zeros(5), torch.full((5,), label))
        (gradient,) = torch.autograd.grad(losses.sum(), scores)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(gradient).all()


def test_the_loss_of_a_tie_is_least_at_equal_scores():
    image, text = torch.nn.functional.normalize(torch.arange(1.0, 13.0).reshape(3, 4).cos(), dim=-1), torch.eye(3, 4)
    tie = torch.full((3,), 0.5)
    assert torch.allclose(pickscore_losses(image, image, text, 10.0, tie), torch.zeros(3), atol=1e-6)
    assert (pickscore_losses(image, image.roll(1, 0), text, 10.0, tie) > 0.01).all()
    assert torch.allclose(hps_losses(image, image, text, 10.0, tie), torch.full((3,), 2.0).log(), atol=1e-6)


def test_example_weights_give_every_prompt_the_same_say():
    weights = example_weights(torch.tensor([1.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0]))
    torch.testing.assert_close(weights, torch.tensor([1 / 3, 1 / 6, 1 / 6, *[1 / 12] * 4]))


@pytest.mark.parametrize("loss", [hps_losses, pickscore_losses])
def test_examples_do_not_influence_each_other(loss):
    given, scale = inputs(RECORDS["pickscore_train_loss_pair"])
    arguments = [given[name] for name in ("image_0", "image_1", "text")]
    whole = loss(*arguments, scale, given["label_0"])
    part = loss(*(value[1:3] for value in arguments), scale, given["label_0"][1:3])
    assert torch.equal(whole[1:3], part)
    assert whole.std() > 0.1
