"""Peak FLOP/s of GPUs by their data sheets: dense matrix products that accumulate in fp32."""

import re

A100_BF16, H100_BF16 = 312e12, 989.4e12
"""FLOP/s of an A100, and of an H100 SXM or H200, in bf16."""

_PEAKS: tuple[tuple[str, float, float], ...] = (
    # Name as a pattern, TFLOP/s in bf16 on the matrix units, and in IEEE fp32.
    (r"NVIDIA GH200.*", H100_BF16 / 1e12, 66.9),
    (r"NVIDIA H200 NVL", 835.5, 60.0),
    (r"NVIDIA H200", H100_BF16 / 1e12, 66.9),
    (r"NVIDIA H100 PCIe", 756.0, 51.2),
    (r"NVIDIA H100 NVL", 835.5, 60.0),
    (r"NVIDIA H[18]00( SXM5?)?( \d+GB HBM3)?", H100_BF16 / 1e12, 66.9),
    (r"NVIDIA A[18]00[- ].*", A100_BF16 / 1e12, 19.5),
    (r"NVIDIA A30", 165.0, 10.3),
    (r"NVIDIA A40", 149.7, 37.4),
    (r"NVIDIA A10", 125.0, 31.2),
    (r"NVIDIA L40S", 362.0, 91.6),
    (r"NVIDIA L40", 181.0, 90.5),
    (r"NVIDIA L4", 121.0, 30.3),
    (r"NVIDIA RTX 6000 Ada Generation", 364.2, 91.1),
    (r"NVIDIA RTX A6000", 154.8, 38.7),
    (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),
    (r"NVIDIA GeForce RTX 3090", 71.0, 35.6),
)
"""Sources: NVIDIA's data sheets and architecture papers (Ampere, Ada, Hopper), no sparsity. GeForce cards
halve their rate where they accumulate in fp32: that rate is listed."""


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of the card `name`, as torch.cuda.get_device_name says it, in bf16 or fp32; None if unknown.

    A MIG slice of a card is unknown, since it has a part of its units.
    """
    if " MIG " in name:
        return None
    for pattern, bf16, fp32 in _PEAKS:
        if re.fullmatch(pattern, name):
            return 1e12 * (bf16 if precision == "bf16" else fp32)
    return None
