"""eval.metrics.nearest against brute force: chunks, ties and invalid rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import generator
from eval.metrics.nearest import nearest_neighbors

TRAINING = torch.randn(101, 12, generator=generator(1))
QUERIES = torch.randn(300, 12, generator=generator(2))  # more than one chunk of queries


def brute_force(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances = (queries.double()[:, None] - rows.double()).square().sum(2).sqrt()
    return distances.sort(dim=1, stable=True).values[:, :k], distances.argsort(dim=1, stable=True)[:, :k]


@settings(max_examples=15)
@given(chunk=st.integers(1, 110), k=st.integers(1, 20), shift=st.sampled_from([0.0, 1e6]))
def test_equals_brute_force_for_any_chunk_size(chunk: int, k: int, shift: float) -> None:
    queries, rows = QUERIES.double()[:40] + shift, TRAINING.double() + shift
    nearest = nearest_neighbors(queries, rows.split(chunk), k=k)
    distances, indices = brute_force(queries, rows, k)
    assert torch.equal(nearest.indices, indices)
    torch.testing.assert_close(nearest.distances, distances, rtol=0, atol=1e-12)


def test_a_copy_of_a_training_image_has_distance_zero() -> None:
    queries = torch.cat([QUERIES, TRAINING[77:78]])
    nearest = nearest_neighbors(queries, TRAINING.split(50), k=2)
    assert torch.equal(nearest.indices, brute_force(queries, TRAINING, 2)[1])
    assert nearest.indices[-1, 0] == 77 and nearest.distances[-1, 0] == 0


@pytest.mark.parametrize("chunk", [3, 7, 40])
def test_ties_go_to_the_lower_index(chunk: int) -> None:
    rows = TRAINING[:4].repeat(5, 1)
    nearest = nearest_neighbors(TRAINING[1:2], rows.split(chunk), k=3)
    assert nearest.indices.tolist() == [[1, 5, 9]] and nearest.distances.abs().max() == 0


def test_invalid_k_and_features_are_refused() -> None:
    with pytest.raises(SettingError, match="k is 0"):
        nearest_neighbors(QUERIES, [TRAINING], k=0)
    with pytest.raises(UserError, match="101 images; 102 nearest"):
        nearest_neighbors(QUERIES, TRAINING.split(50), k=102)
    with pytest.raises(UserError, match=r"training features are \[101, 5\]; expected \[n, 12\]"):
        nearest_neighbors(QUERIES, [TRAINING[:, :5]], k=1)
    not_finite = TRAINING.clone()
    not_finite[3, 4] = torch.nan
    with pytest.raises(UserError, match="training features hold a value that is not finite"):
        nearest_neighbors(QUERIES, [not_finite], k=1)
    with pytest.raises(UserError, match="generated features hold"):
        nearest_neighbors(not_finite, [TRAINING], k=1)
