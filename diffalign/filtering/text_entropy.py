"""How much a prompt adds to the variety of prompts: the k-NN estimate of entropy in a text encoder's space.

    H(C) = psi(n) - psi(k) + log V_D + D/n * sum_c log d_c^(k)       (Kozachenko and Leonenko)

d_c^(k) is the Euclidean distance of the unit embedding of c to its k-th nearest neighbour among the other prompts, so
log d_c is what c contributes. Distances are exact and found tile by tile: n x n numbers never exist.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import digamma, gammaln
from torch import Tensor

import reward_models
from diffalign.errors import DataError, ModelError, suggestion

BACKENDS = ("auto", "torch", "faiss")
# Candidates beyond k: cosines in float32 rank near-duplicates wrongly, their exact distances then do it right.
SLACK = 4
GROUP = 64  # columns whose maximum is looked at before any of them


class ClipTextEncoder:
    """Embed prompts with the text tower of a CLIP model: projected and of unit length.

    Args:
        path_or_id: a Hugging Face CLIPModel folder or hub id, e.g. openai/clip-vit-large-patch14 or PickScore's.
        device: where it runs.
        dtype: of its weights.
    """

    def __init__(self, path_or_id: str, device: torch.device, dtype: torch.dtype = torch.float32):
        try:
            self.tower = reward_models.load("pickscore", path_or_id, device, dtype)
        except reward_models.ScorerError as error:
            raise ModelError(
                f"Cannot load the text encoder: {error} Give --text-encoder the folder or hub id of a CLIPModel, "
                "e.g. openai/clip-vit-large-patch14."
            ) from error

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], batch_size: int = 256, advance: Callable[[int], None] = lambda count: None
    ) -> Tensor:
        """Return unit embeddings [N, D] float32 on the CPU."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            parts.append(self.tower.text_embeddings(batch).cpu())
            advance(len(batch))
        return torch.cat(parts)


def nearest_distances(
    embeddings: Tensor,
    k: int,
    *,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    rows: int = 1024,
    columns: int = 16384,
    advance: Callable[[int], None] = lambda count: None,
) -> NDArray[np.float64]:
    """Return the distances [n, k] of each row to its 1st, ..., k-th nearest other row, after L2 normalisation.

    Exact: candidates are ranked by float32 cosines, and the distances of the k + 4 best are computed by subtraction.
    (Among more than that many rows within about 5e-4 of each other, which is the nearest is up to rounding.)

    Args:
        embeddings: [n, D], n > k.
        k: number of neighbours.
        backend: "torch", "faiss" (its exact index), or "auto": faiss where it is installed and the device is a CPU.
        device: where tiles are computed.
        rows: queries at a time.
        columns: rows compared with them at a time; memory is about 8 * rows * columns bytes beside the embeddings.
        advance: told how many rows are done.

    Raises:
        DataError: fewer than k + 1 rows, a zero row, or an unknown or missing backend.
    """
    _check(embeddings, k)
    units = F.normalize(embeddings.to(device, torch.float32), dim=-1)
    count = min(k + SLACK, len(units) - 1)
    candidates = _faiss_candidates(units) if _use_faiss(backend, units) else _tile_candidates(units, rows, columns)
    found = []
    for start in range(0, len(units), rows):
        queries = torch.arange(start, min(start + rows, len(units)), device=units.device)
        neighbours = candidates(queries, count)
        distance = torch.stack([(units[queries] - units[column]).norm(dim=-1) for column in neighbours.T], dim=-1)
        found.append(distance.sort(dim=-1).values[:, :k].double().cpu())
        advance(len(queries))
    return torch.cat(found).numpy()


def knn_entropy(distances: NDArray[np.float64], k: int, dimension: int, epsilon: float = 1e-6) -> float:
    """Return the Kozachenko-Leonenko estimate in nats from distances [n] to the k-th neighbour.

    The embeddings lie on a sphere and near a much thinner manifold: compare values, do not read one as an entropy.
    """
    volume = 0.5 * dimension * np.log(np.pi) - gammaln(0.5 * dimension + 1.0)
    return float(digamma(len(distances)) - digamma(k) + volume + dimension * np.log(distances + epsilon).mean())


def _check(embeddings: Tensor, k: int) -> None:
    if len(embeddings) <= k:
        raise DataError(
            f"{len(embeddings)} distinct prompts have no {k}-th nearest neighbour each. Lower --neighbours, or leave "
            "the term out with --gamma 0."
        )
    bad = ~torch.isfinite(embeddings).all(dim=-1) | (embeddings == 0).all(dim=-1)
    if bad.any():
        raise DataError(f"Embedding {int(bad.nonzero()[0])} is zero or not finite, so it has no direction.")


def _tile_candidates(units: Tensor, rows: int, columns: int) -> Callable[[Tensor, int], Tensor]:
    """Return a function (queries [q], count) -> indices [q, count] of the rows of highest cosine, never the query."""
    columns = min(columns, len(units))
    # one piece of memory for all tiles: fresh pages cost as much as the product
    tile = torch.empty(min(rows, len(units)) * columns, device=units.device)

    def candidates(queries: Tensor, count: int) -> Tensor:
        best = torch.full((len(queries), count), -torch.inf, device=units.device)
        indices = torch.zeros(len(queries), count, dtype=torch.int64, device=units.device)
        for start in range(0, len(units), columns):
            others = units[start : start + columns]
            cosine = tile[: len(queries) * len(others)].view(len(queries), len(others))
            torch.mm(units[queries], others.T, out=cosine)
            own = (queries >= start) & (queries < start + cosine.shape[1])
            cosine[own.nonzero()[:, 0], queries[own] - start] = -torch.inf
            values, places = _top(cosine, min(count, cosine.shape[1]))
            merged = torch.cat([best, values], dim=1)
            best, order = merged.topk(count, dim=1)
            indices = torch.cat([indices, places + start], dim=1).gather(1, order)
        return indices

    return candidates


def _top(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row [q, n] and where they are.

    The largest lie in the groups of largest maxima, so that a sort sees count * GROUP numbers instead of n.
    """
    q, n = values.shape
    if n <= (count + 1) * GROUP:
        return values.topk(count, dim=1)
    padded = F.pad(values, (0, -n % GROUP), value=-torch.inf) if n % GROUP else values
    grouped = padded.view(q, -1, GROUP)
    groups = grouped.amax(dim=-1).topk(count, dim=1).indices
    inside = grouped.gather(1, groups[..., None].expand(-1, -1, GROUP)).view(q, -1)
    best, order = inside.topk(count, dim=1)
    return best, groups.gather(1, order // GROUP) * GROUP + order % GROUP


def _use_faiss(backend: str, units: Tensor) -> bool:
    if backend not in BACKENDS:
        raise DataError(f'Unknown backend "{backend}".{suggestion(backend, BACKENDS)} Use {", ".join(BACKENDS)}.')
    installed = find_spec("faiss") is not None
    if backend == "faiss" and not installed:
        raise DataError("faiss is not installed. Install faiss-cpu, or use the backend torch, which is as exact.")
    return installed and (backend == "faiss" or (backend == "auto" and units.device.type == "cpu"))


def _faiss_candidates(units: Tensor) -> Callable[[Tensor, int], Tensor]:
    import faiss

    index: Any = faiss.IndexFlatIP(units.shape[1])
    index.add(units.cpu().numpy())

    def candidates(queries: Tensor, count: int) -> Tensor:
        found = torch.from_numpy(index.search(units[queries].cpu().numpy(), count + 1)[1]).to(units.device)
        # The query itself is nearly always among them; where duplicates crowd it out, the last one goes instead.
        other = found != queries[:, None]
        other[other.all(dim=1), -1] = False
        return found[other].view(len(queries), count)

    return candidates
