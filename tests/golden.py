"""Golden records: where they are, how a result is compared with one, and the inputs that are given by a formula.

A record holds `id`, `what`, `source`, `inputs`, `hyperparameters`, `expected`, `tolerance` and `notes`.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_WORD = 2**32


@functools.cache
def load(name: str) -> dict[str, dict[str, Any]]:
    """Read `tests/goldens/<name>.json`: record by id."""
    records = json.loads((Path(__file__).parent / "goldens" / f"{name}.json").read_text())
    return {record["id"]: record for record in records}


def assert_close(record: dict[str, Any], key: str, got: Any) -> None:
    """Compare with `expected[key]`: |got - e| <= rtol * |e| + atol * max(1, max |e|); null stands for NaN."""
    expected = _float64(record["expected"][key])
    got = got.detach().double().cpu() if isinstance(got, Tensor) else _float64(got)
    where = f"{record['id']}, {key}"
    assert got.shape == expected.shape, f"{where}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    undefined = expected.isnan()
    assert torch.equal(got.isnan(), undefined), f"{where}: NaN at {got.isnan().nonzero().tolist()}"
    magnitude = expected[~undefined].abs()
    scale = max(1.0, magnitude.max().item()) if magnitude.numel() else 1.0
    allowed = record["tolerance"]["rtol"] * expected.abs() + record["tolerance"]["atol"] * scale
    excess = ((got - expected).abs() - allowed)[~undefined]
    assert bool((excess <= 0).all()), f"{where}: got {got.tolist()}, expected {expected.tolist()}"


def hash_uniform(n: int, stream: int) -> Tensor:
    """Return u(i, stream) in [0, 1) for i = 0..n-1 [n] float64: a hash of the index, not a random generator."""
    return torch.tensor([_hash(index, stream) / _WORD for index in range(n)], dtype=torch.float64)


def hash_fill(shape: Sequence[int], stream: int) -> Tensor:
    """Return 2 * u - 1 in C order, in the shape given, float64."""
    return (2 * hash_uniform(math.prod(shape), stream) - 1).reshape(tuple(shape))


def hash_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return weights by name and shape, float64: each a hash fill whose stream is the rank of its name."""
    weights = {}
    for stream, (key, shape) in enumerate(sorted(shapes.items())):
        value = hash_fill(shape, stream)
        if key.endswith("logit_scale"):
            weights[key] = torch.tensor(100.0, dtype=torch.float64).log()
        elif len(shape) < 2:
            is_norm_weight = key.endswith("weight") and ("ln_" in key.lower() or "norm" in key.lower())
            weights[key] = (1.0 if is_norm_weight else 0.0) + 0.1 * value
        else:
            weights[key] = value * 1.5 / math.prod(shape[1:]) ** 0.5
    return weights


def _hash(index: int, stream: int) -> int:
    """Mix an index and a stream into an unsigned 32-bit number."""
    x = (index * 2654435761 + stream * 2246822519 + 374761393) % _WORD
    x = (x ^ (x >> 15)) * 2246822519 % _WORD
    x = (x ^ (x >> 13)) * 3266489917 % _WORD
    return x ^ (x >> 16)


def _float64(values: Any) -> Tensor:
    """Turn nested lists into a tensor, null into NaN."""
    if isinstance(values, list):
        return torch.stack([_float64(value) for value in values]) if values else torch.empty(0, dtype=torch.float64)
    return torch.tensor(float("nan") if values is None else float(values), dtype=torch.float64)


def network(kind: type[nn.Module], record: Mapping[str, Any]) -> nn.Module:
    """Return the whole network of a record, its weights a formula that is checked against the record's sums."""
    built = kind(**record["hyperparameters"]["constructor"])
    weights = hash_weights({name: parameter.shape for name, parameter in built.named_parameters()})
    expected = record["expected"]["weights"]
    assert sum(weight.numel() for weight in weights.values()) == expected["parameters"]
    assert math.isclose(sum(weight.sum().item() for weight in weights.values()), expected["sum"], rel_tol=1e-6)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(weights[name])
    return built


def fill(shape: Sequence[int], stream: int, scale: float = 1.0) -> Tensor:
    """Return `hash_fill` times `scale`, float32."""
    return (scale * hash_fill(shape, stream)).float()
