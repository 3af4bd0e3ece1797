"""d2g.core.peak_flops: names as torch.cuda.get_device_name says them, and peaks in closed form."""

import pytest

from d2g.core.peak_flops import peak_flops


@pytest.mark.parametrize(
    ("name", "units", "bf16_per_clock", "bf16_mhz", "fp32_per_clock", "fp32_mhz"),
    [
        # Multiprocessors; multiply-adds of one in a clock, and its clock, on matrix units and others.
        ("NVIDIA A100-SXM4-80GB", 108, 1024, 1410, 64, 1410),
        ("NVIDIA A100-PCIE-40GB", 108, 1024, 1410, 64, 1410),
        ("NVIDIA A100 80GB PCIe", 108, 1024, 1410, 64, 1410),
        ("NVIDIA H100 80GB HBM3", 132, 2048, 1830, 128, 1980),
        ("NVIDIA H200", 132, 2048, 1830, 128, 1980),
        ("NVIDIA H100 PCIe", 114, 2048, 1620, 128, 1755),
        ("NVIDIA L4", 58, 512, 2040, 128, 2040),
        ("NVIDIA GeForce RTX 3090", 82, 256, 1695, 128, 1695),
        ("NVIDIA GeForce RTX 4090", 128, 256, 2520, 128, 2520),
    ],
)
def test_the_peak_is_units_times_clock(
    name: str, units: int, bf16_per_clock: int, bf16_mhz: int, fp32_per_clock: int, fp32_mhz: int
) -> None:
    bf16, fp32 = 2e6 * units * bf16_per_clock * bf16_mhz, 2e6 * units * fp32_per_clock * fp32_mhz
    assert peak_flops(name, "bf16") == pytest.approx(bf16, rel=0.005)
    assert peak_flops(name, "fp32") == pytest.approx(fp32, rel=0.005)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla T4",
        "NVIDIA A1000",
        "",
    ],
)
def test_an_unknown_card_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None
