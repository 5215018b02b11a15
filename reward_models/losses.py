"""Losses on the embeddings of two images of a prompt; all return one value a pair, unreduced."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_losses(score_0: Tensor, score_1: Tensor, label_0: Tensor) -> Tensor:
    """Return the cross-entropy [B] of the soft label [B] with the choice the scores [B] predict.

    l = -label_0 * log sigmoid(score_0 - score_1) - (1 - label_0) * log sigmoid(score_1 - score_0)
    """
    return -label_0 * F.logsigmoid(score_0 - score_1) - (1 - label_0) * F.logsigmoid(score_1 - score_0)


def hps_losses(image_0: Tensor, image_1: Tensor, text: Tensor, logit_scale: Tensor | float, label_0: Tensor) -> Tensor:
    """Return HPSv2's loss [B] of unit embeddings [B, D]; the official code SUMS it over the batch.

    Source: HPSLoss, hpsv2/src/open_clip/loss.py, commit 866735ec. Scores are logit_scale * <text, image>.
    """
    return pair_losses(logit_scale * (text * image_0).sum(-1), logit_scale * (text * image_1).sum(-1), label_0)


def pickscore_losses(
    image_0: Tensor,
    image_1: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    label_0: Tensor,
    *,
    in_batch_negatives: bool = False,
) -> Tensor:
    """Return PickScore's loss [B] of unit embeddings [B, D], to be weighted by `example_weights` and summed.

    Source: CLIPCriterion, trainer/criterions/clip_criterion.py, commit f79607ff. It is the cross-entropy of the
    pair less log 2 for a tie, whose optimum is then 0. With in-batch negatives the pair is one of many choices:
    half the cross-entropy of the preferred image's prompt among all B prompts, plus half that of the preferred
    image among all 2B images.
    """
    tie = (label_0 == 0.5).to(label_0.dtype) * math.log(0.5)
    if not in_batch_negatives:
        return hps_losses(image_0, image_1, text, logit_scale, label_0) + tie
    own = torch.arange(len(text), device=text.device)
    prompt_0 = F.cross_entropy(logit_scale * image_0 @ text.T, own, reduction="none")
    prompt_1 = F.cross_entropy(logit_scale * image_1 @ text.T, own, reduction="none")
    images = logit_scale * text @ torch.cat([image_0, image_1]).T
    choice_0 = F.cross_entropy(images, own, reduction="none")
    choice_1 = F.cross_entropy(images, own + len(text), reduction="none")
    return (label_0 * (prompt_0 + choice_0) + (1 - label_0) * (prompt_1 + choice_1) + tie) / 2


def example_weights(pairs_of_prompt: Tensor) -> Tensor:
    """Return weights [B] that sum to 1, inverse to how many pairs [B] share a prompt: no prompt dominates."""
    return (1 / pairs_of_prompt) / (1 / pairs_of_prompt).sum()
