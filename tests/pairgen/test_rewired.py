"""Pairs that are no deterministic pairs: rewired ones and ones with churn (supplement E of the paper)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny_teachers
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.schedule import Denoised, Point
from d2g.diffusion.solvers import Churn, sample_ode
from distill.training.train import train
from jobs import BATCH, distill_config, make_pairs
from pairgen.config import PairConfig
from pairgen.job import config_from_spec, open_job
from pairgen.store.reader import PairReader
from pairgen.store.rewired import RewiredReader

EDM = EDMSchedule(
    sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, grid="karras", prediction="epsilon"
)


@pytest.fixture(scope="module")
def edm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_teachers.save_edm(tmp_path_factory.mktemp("edm") / "teacher"))


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(teacher, tmp_path_factory.mktemp("pairs"), steps=1, guidance=1.0)


def test_rewiring_permutes_the_noise_of_the_training_rows_alone(pairs: Path) -> None:
    reader = PairReader(pairs)
    size, held_out = len(reader), 2
    rewired = RewiredReader(reader, size - held_out, seed=3)
    plain, other = reader.read(range(size)), rewired.read(range(size))
    assert torch.equal(other.latents, plain.latents) and other.prompts == plain.prompts
    assert torch.equal(other.index, plain.index) and len(rewired) == size
    # The same set of noises, in another order; the held-out rows keep theirs.
    rows = {row.numpy().tobytes() for row in plain.noise}
    assert {row.numpy().tobytes() for row in other.noise} == rows
    assert not torch.equal(other.noise, plain.noise)
    assert torch.equal(other.noise[-held_out:], plain.noise[-held_out:])
    # A row does not depend on the batch that it is read with, and another seed gives another permutation.
    assert torch.equal(rewired.read([5, 1]).noise, other.noise[[5, 1]])
    assert not torch.equal(RewiredReader(reader, size, seed=4).read(range(size)).noise, other.noise)


def test_a_rewired_run_trains_on_other_noise_and_resumes(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    losses = {}
    for rewire in ("false", "true"):
        config = distill_config(teacher, pairs, f"train.images={2 * BATCH}", f"data.rewire={rewire}")
        losses[rewire] = train(config, tmp_path / rewire).loss
    assert losses["true"] != losses["false"]
    # In two parts, like in one.
    for images in (BATCH, 2 * BATCH):
        config = distill_config(teacher, pairs, f"train.images={images}", "data.rewire=true")
        summary = train(config, tmp_path / "parts")
    assert summary.loss == losses["true"]


def gaussian_denoiser(std: float) -> object:
    """The exact denoiser of data N(0, std^2)."""

    def denoise(x: torch.Tensor, point: Point) -> Denoised:
        x0 = x * std**2 / (std**2 + point.sigma**2)
        return Denoised(x0, (x - x0) / point.sigma)

    return denoise


@pytest.mark.slow
@pytest.mark.parametrize("amount", [10.0, 80.0])
def test_churn_keeps_the_distribution_and_forgets_the_noise(amount: float) -> None:
    """With an exact denoiser, samples keep the data's variance; the ODE alone maps z to a multiple of z."""
    z = noise(0, range(4096), (1, 2, 2))
    churn = Churn(amount, lambda step: noise(1 + step, range(4096), (1, 2, 2)))
    denoise = gaussian_denoiser(0.5)
    samples = sample_ode(denoise, z, EDM, 64, "heun", churn)  # type: ignore[arg-type]
    plain = sample_ode(denoise, z, EDM, 64, "heun")  # type: ignore[arg-type]
    assert samples.std().item() == pytest.approx(0.5, rel=0.03)
    assert torch.corrcoef(torch.stack([plain.flatten(), z.flatten()]))[0, 1] > 0.9999
    assert torch.corrcoef(torch.stack([samples.flatten(), z.flatten()]))[0, 1].abs() < 0.5


def test_without_an_amount_churn_is_the_ode() -> None:
    z, denoise = noise(0, range(4), (1, 2, 2)), gaussian_denoiser(0.5)
    none = Churn(0.0, lambda step: z)
    assert torch.equal(
        sample_ode(denoise, z, EDM, 8, "heun", none),  # type: ignore[arg-type]
        sample_ode(denoise, z, EDM, 8, "heun"),  # type: ignore[arg-type]
    )


def test_rows_with_churn_depend_on_seed_and_pair_alone(edm: str) -> None:
    config = PairConfig(teacher=edm, num_pairs=4, guidance=1.0, steps=4, churn=4.0)
    job = open_job(config)
    _, latents, _ = job.rows([0, 1, 2])
    _, alone, _ = job.rows([2])
    torch.testing.assert_close(alone[0], latents[2], rtol=1e-5, atol=1e-5)
    _, plain, _ = open_job(replace(config, churn=0.0)).rows([0, 1, 2])
    assert not torch.allclose(plain, latents, atol=1e-2)
    # The store records it; deterministic stores are as before there was such a field.
    assert job.spec.churn == 4.0 and open_job(config_from_spec(job.spec)).spec == job.spec
    assert "churn" not in open_job(replace(config, churn=0.0)).spec.as_json()


def test_churn_is_refused_without_an_edm_teacher(teacher: Path) -> None:
    config = PairConfig(teacher=str(teacher), num_pairs=4, guidance=1.0, steps=4, churn=4.0)
    with pytest.raises(SettingError, match=r"churn is 4, but teacher .* is not preconditioned as in EDM"):
        open_job(config)
    with pytest.raises(SettingError, match="churn is -1"):
        PairConfig(churn=-1.0)
