"""Hashes of the parts of a model."""

import json
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin


def tokenizer_identity(tokenizer: Any) -> bytes:
    """Return all that decides which tokens a text becomes."""
    # Padding and truncation are left out: calling the tokenizer changes them.
    words = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    model = json.loads(words.backend_tokenizer.to_str())
    parts = [model["model"], model["normalizer"], model["pre_tokenizer"], model["added_tokens"]]
    if template := getattr(tokenizer, "chat_template", None):
        parts.append(template)
    return json.dumps([parts, words.model_max_length, words.pad_token_id], sort_keys=True).encode()


def update_with_tensors(digest: Any, module: nn.Module) -> None:
    """Add the names, shapes and values of a module's tensors to a hash."""
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
