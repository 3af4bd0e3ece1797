"""d2g.diffusion.lora: recovering adapters from the weights of teacher and student."""

import pytest
import torch

from d2g.core.seeds import generator
from d2g.diffusion.lora import (
    adapters_from_teacher,
    add_lora,
    has_lora,
    low_rank_factors,
    merged,
    unexplained_weights,
)


def random_matrix(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(11, number))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(200, 120, 5), (120, 200, 70), (7, 9, 7), (6, 6, 0)])
def test_factors_have_minimal_rank(rows: int, columns: int, rank: int) -> None:
    matrix = random_matrix(0, rows, rank).double() @ random_matrix(1, rank, columns).double()
    b, a = low_rank_factors(matrix, 1e-5)
    assert b.shape == (rows, rank) and a.shape == (rank, columns) and b.dtype == a.dtype == torch.float32
    torch.testing.assert_close(b.double() @ a.double(), matrix, rtol=0, atol=1e-5 * max(1, rank))


def test_rank_ignores_rounding_noise() -> None:
    matrix = (random_matrix(0, 40, 3) @ random_matrix(1, 3, 30)).double()
    assert len(low_rank_factors(matrix + 1e-7 * random_matrix(2, 40, 30), 1e-5)[1]) == 3
    assert len(low_rank_factors(matrix + 1e-7 * random_matrix(2, 40, 30), 1e-9)[1]) == 30


def state(teacher: dict[str, torch.Tensor], number: int, rank: int) -> dict[str, torch.Tensor]:
    """A student's state dict with adapters on every `to_q` and one other weight."""
    result = {"plain.weight": teacher["plain.weight"]}
    for i, stem in enumerate(("one.to_q", "two.to_q")):
        rows, columns = teacher[f"{stem}.weight"].shape
        result[f"{stem}.base_layer.weight"] = teacher[f"{stem}.weight"]
        result[f"{stem}.lora_A.default.weight"] = random_matrix(10 * number + i, rank, columns)
        result[f"{stem}.lora_B.default.weight"] = random_matrix(20 * number + i, rows, rank)
    return result


TEACHER = {
    "one.to_q.weight": random_matrix(1, 12, 20),
    "two.to_q.weight": random_matrix(2, 16, 10),
    "plain.weight": random_matrix(3, 4),
}


def difference(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    return tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


def test_adapters_of_one_run_keep_their_rank_and_absorb_their_scale() -> None:
    own = state(TEACHER, 1, 3)
    result = adapters_from_teacher(own, TEACHER, 3, 6.0)
    assert unexplained_weights(own, TEACHER) == [] and len(result) == 4
    assert torch.equal(result["one.to_q.lora_A.weight"], own["one.to_q.lora_A.default.weight"])
    assert torch.equal(result["one.to_q.lora_B.weight"], 2 * own["one.to_q.lora_B.default.weight"])


def test_adapters_of_three_runs_add_up() -> None:
    """Each run starts from the merged weights of the one before; the first run does not change one layer."""
    first = state(TEACHER, 1, 2)
    first["two.to_q.lora_B.default.weight"].zero_()
    second = state(merged(first, 2, 1.0), 2, 3)
    third = state(merged(second, 3, 6.0), 3, 1)
    assert unexplained_weights(third, TEACHER) == []
    result = adapters_from_teacher(third, TEACHER, 1, 0.5)
    for name, value in merged(third, 1, 0.5).items():
        stem = name.removesuffix(".weight")
        change = difference(result, stem) if "to_q" in stem else 0
        torch.testing.assert_close(TEACHER[name] + change, value, rtol=0, atol=1e-4)
    ranks = {name: len(value) for name, value in result.items() if "lora_A" in name}
    assert ranks == {"one.to_q.lora_A.weight": 6, "two.to_q.lora_A.weight": 6}, "one rank for all"


def test_changed_weights_without_adapters_are_reported() -> None:
    own = state(TEACHER, 1, 3)
    own["plain.weight"] = own["plain.weight"] + 1e-5
    assert unexplained_weights(own, TEACHER) == ["plain.weight"]


def test_weights_in_bf16_hold_no_sum_of_adapters() -> None:
    """Rounded as the teacher's they are explained; a sum with adapters, which was rounded, is not."""
    first, stem = state(TEACHER, 1, 2), "one.to_q"
    first[f"{stem}.base_layer.weight"] = TEACHER[f"{stem}.weight"].bfloat16()
    rounded = {**TEACHER, f"{stem}.weight": TEACHER[f"{stem}.weight"].bfloat16()}
    assert unexplained_weights(first, rounded) == []
    assert unexplained_weights(first, TEACHER) == [f"{stem}.weight"]
    sums = merged(first, 2, 2.0)
    assert sums[f"{stem}.weight"].dtype == torch.float32
    second = state(sums, 2, 2)
    assert unexplained_weights(second, rounded) == []
    second[f"{stem}.base_layer.weight"] = second[f"{stem}.base_layer.weight"].bfloat16()
    assert unexplained_weights(second, rounded) == [f"{stem}.weight"]


def test_adapters_are_drawn_without_asking_every_gpu_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would copy the random state of each GPU, which this process does not use, and warn of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    network = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
    before = torch.get_rng_state()
    add_lora(network, ("to_q",), 2, 2.0, generator(0))
    assert has_lora(network.state_dict()) and torch.equal(torch.get_rng_state(), before)
