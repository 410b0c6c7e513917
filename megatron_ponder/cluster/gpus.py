"""What known GPUs can do at most, from their makers' data sheets.

Rates are those of dense products with fp32 accumulation, without sparsity, which data sheets double. fp32 is that of
the ordinary units, because PyTorch does not round to TF32 unless it is told to. Links are one direction of NVLink, or
of the PCIe slot where there is none.

Sources: data sheets "NVIDIA V100", "NVIDIA A100", "NVIDIA H100", "NVIDIA H200", "NVIDIA DGX B200" (an eighth of it),
"NVIDIA L40S", "NVIDIA A10"; for GH200 "NVIDIA GH200 Grace Hopper Superchip"; for the RTX 4090 the white paper "NVIDIA
Ada GPU Architecture", appendix A.
"""

import re
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        pattern: regular expression that the name which CUDA reports matches as a whole.
        bf16: FLOP/s in bf16; None where it has no units for it.
        fp32: FLOP/s in fp32.
        memory: in GB, as it is sold.
        memory_bandwidth: bytes/s.
        link: bytes/s in one direction to the other GPUs of a node.
    """

    pattern: str
    bf16: float | None
    fp32: float
    memory: float
    memory_bandwidth: float
    link: float

    def peak(self, precision: str) -> float | None:
        """FLOP/s at `training.precision`; None where it is not made for it."""
        return self.bf16 if precision == "bf16" else self.fp32


GPUS = {
    "V100": Gpu(r"(Tesla|NVIDIA) V100-SXM\d-32GB", None, 15.7 * TERA, 32, 900 * GIGA, 150 * GIGA),
    "A10": Gpu(r"NVIDIA A10G?", 125 * TERA, 31.2 * TERA, 24, 600 * GIGA, 32 * GIGA),
    "A100-40GB": Gpu(r"NVIDIA A100-SXM4-40GB", 312 * TERA, 19.5 * TERA, 40, 1555 * GIGA, 300 * GIGA),
    "A100-80GB": Gpu(r"NVIDIA A100-SXM\d?-80GB", 312 * TERA, 19.5 * TERA, 80, 2039 * GIGA, 300 * GIGA),
    "A100-PCIe": Gpu(
        r"NVIDIA A100(-PCIE-40GB| 80GB PCIe|-PCIE-80GB)", 312 * TERA, 19.5 * TERA, 80, 1935 * GIGA, 32 * GIGA
    ),
    "H100-SXM": Gpu(r"NVIDIA H100 80GB HBM3|NVIDIA H100", 989 * TERA, 67 * TERA, 80, 3350 * GIGA, 450 * GIGA),
    "H100-PCIe": Gpu(r"NVIDIA H100 PCIe", 756 * TERA, 51 * TERA, 80, 2000 * GIGA, 64 * GIGA),
    "H100-NVL": Gpu(r"NVIDIA H100 NVL", 835 * TERA, 60 * TERA, 94, 3900 * GIGA, 300 * GIGA),
    "H200": Gpu(r"NVIDIA H200", 989 * TERA, 67 * TERA, 141, 4800 * GIGA, 450 * GIGA),
    "GH200": Gpu(r"NVIDIA GH200 \d+GB", 989 * TERA, 67 * TERA, 96, 4000 * GIGA, 450 * GIGA),
    "B200": Gpu(r"NVIDIA B200", 2250 * TERA, 75 * TERA, 180, 8000 * GIGA, 900 * GIGA),
    "L40S": Gpu(r"NVIDIA L40S", 362 * TERA, 91.6 * TERA, 48, 864 * GIGA, 32 * GIGA),
    "RTX-4090": Gpu(r"NVIDIA GeForce RTX 4090", 165 * TERA, 82.6 * TERA, 24, 1008 * GIGA, 32 * GIGA),
}


def known_gpu(reported: str) -> Gpu | None:
    """The GPU of which CUDA reports this name; None for others, and for slices of one (MIG)."""
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.pattern, reported)), None)
