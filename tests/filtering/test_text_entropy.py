"""Exact nearest neighbours in tiles against brute force, the entropy estimate, and the text tower."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from diffalign.errors import DataError, ModelError
from diffalign.filtering import ClipTextEncoder, knn_entropy, nearest_distances

ROOT_ASSET = "assets/tiny-pickscore"


def brute_force(embeddings, k):
    units = torch.nn.functional.normalize(embeddings, dim=-1).double().numpy()
    distance = cdist(units, units)
    np.fill_diagonal(distance, np.inf)
    return np.sort(distance, axis=1)[:, :k]


@pytest.mark.parametrize(("rows", "columns"), [(1024, 16384), (64, 1000), (37, 64), (600, 65), (300, 2048)])
@pytest.mark.parametrize("k", [1, 5])
def test_tiles_equal_brute_force(rows, columns, k):
    embeddings = torch.randn(1301, 12, generator=torch.Generator().manual_seed(0))
    found = nearest_distances(embeddings, k, rows=rows, columns=columns, backend="torch")
    assert found.shape == (1301, k)
    assert np.allclose(found, brute_force(embeddings, k), rtol=1e-5, atol=0)


def test_near_duplicates_keep_their_exact_distance():
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(500, 32, generator=generator)
    embeddings[1] = embeddings[0] + 1e-5 * torch.randn(32, generator=generator)
    found = nearest_distances(embeddings, 1, columns=128, backend="torch")
    assert found[0, 0] < 1e-4
    assert np.allclose(found, brute_force(embeddings, 1), rtol=1e-2)


def test_duplicates_are_at_distance_zero_of_each_other_not_of_themselves():
    embeddings = torch.eye(4).repeat(3, 1)
    assert nearest_distances(embeddings, 2).max() == 0
    assert np.allclose(nearest_distances(embeddings, 3)[:, 2], 2**0.5)
    assert np.allclose(nearest_distances(torch.eye(4), 3), 2**0.5)


def test_length_does_not_matter_and_progress_is_told():
    embeddings = torch.randn(50, 8)
    scaled = embeddings * torch.rand(50, 1).add(0.1)
    told = []
    found = nearest_distances(scaled, 2, rows=20, advance=told.append)
    assert np.allclose(found, nearest_distances(embeddings, 2), atol=1e-5)
    assert told == [20, 20, 10]


def test_what_has_no_neighbours_is_an_error():
    with pytest.raises(DataError, match=r"3 distinct prompts have no 3-th nearest.*--gamma 0"):
        nearest_distances(torch.eye(3), 3)
    with pytest.raises(DataError, match="Embedding 1 is zero"):
        nearest_distances(torch.tensor([[1.0, 0], [0, 0], [0, 1]]), 1)
    with pytest.raises(DataError, match='Did you mean "torch"'):
        nearest_distances(torch.eye(3), 1, backend="tosch")


def test_faiss_gives_the_same_where_it_is_installed():
    embeddings = torch.randn(700, 16, generator=torch.Generator().manual_seed(2))
    embeddings[10:30] = embeddings[9]
    if find_spec("faiss") is None:
        with pytest.raises(DataError, match="Install faiss-cpu"):
            nearest_distances(embeddings, 3, backend="faiss")
    else:
        found = nearest_distances(embeddings, 3, backend="faiss", rows=100)
        assert np.allclose(found, nearest_distances(embeddings, 3, backend="torch"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_entropy_of_uniform_points_on_a_line_segment(k):
    # H of a uniform density on [0, s] is log s; one estimate of 1000 points scatters by 0.05.
    estimates = []
    for seed in range(16):
        points = 3.0 * np.random.default_rng(seed).random(1000)
        gaps = np.sort(np.abs(points[:, None] - points), axis=1)  # the first is the point itself
        estimates.append(knn_entropy(gaps[:, k], k, 1, epsilon=0.0))
    assert np.mean(estimates) == pytest.approx(np.log(3.0), abs=0.04)


def test_text_tower_embeds_to_unit_length_whatever_the_batch():
    encoder = ClipTextEncoder(ROOT_ASSET, torch.device("cpu"))
    prompts = ["a red circle on a blue background", "a blue star", "a Blue  star", "two green squares"]
    embeddings = encoder(prompts)
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(4))
    assert torch.allclose(embeddings, encoder(prompts, batch_size=1), atol=1e-6)
    assert torch.allclose(embeddings[1], embeddings[2])  # the tokenizer sees no difference
    assert not torch.allclose(embeddings[0], embeddings[1])


def test_an_unusable_encoder_is_named(tmp_path):
    with pytest.raises(ModelError, match="--text-encoder"):
        ClipTextEncoder(str(tmp_path / "none"), torch.device("cpu"))
