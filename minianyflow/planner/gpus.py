"""GPUs as their makers describe them: memory, and the rate of dense bfloat16 matrix products."""

from dataclasses import dataclass, replace
from math import inf

from minianyflow.support.errors import InputError, choose

SPARE = 0.05  # share of a GPU's memory for what is not counted: CUDA's own, workspaces, fragments


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. rate: dense bfloat16 FLOP per second, with sums in float32. source: of both numbers.

    bus: bytes per second to and from CPU memory, each way: PCIe of 16 lanes, generation 4 or 5. link: to other GPUs.
    """

    name: str
    memory: float
    rate: float
    source: str
    bus: float = 32e9
    link: float = 32e9

    def holds(self, peak: float) -> bool:
        """Whether so many bytes fit, with SPARE left."""
        return peak <= (1 - SPARE) * self.memory


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 141e9, 989e12, "NVIDIA H200 data sheet, SXM; dense is half of the rate with sparsity", 64e9, 450e9),
        Gpu("pro6000", 96e9, 503e12, "RTX PRO 6000 Blackwell; four times its FP32 rate, as of the L40S", 64e9, 64e9),
        Gpu("h100", 80e9, 989e12, "NVIDIA H100 data sheet, SXM; dense is half of the rate with sparsity", 64e9, 450e9),
        Gpu("a100-80", 80e9, 312e12, "NVIDIA A100 80GB data sheet", 32e9, 300e9),
        Gpu("l40s", 48e9, 362e12, "NVIDIA L40S data sheet; dense is half of the rate with sparsity"),
        Gpu("rtx4090", 24e9, 165e12, "NVIDIA Ada GPU architecture white paper, RTX 4090, FP32 accumulate, dense"),
        Gpu("rtx4080", 16e9, 97e12, "NVIDIA Ada GPU architecture white paper, RTX 4080, FP32 accumulate, dense"),
    )
}


def find_gpu(name: str = "h200", memory: float | None = None, rate: float | None = None) -> Gpu:
    """The GPU called `name`, with another memory (GB) or rate (TFLOP/s) if given. Raises InputError for bad values."""
    for what, value, unit in (("memory", memory, "GB"), ("rate", rate, "TFLOP/s")):
        if value is not None and not 0 < value < inf:
            raise InputError(f"a GPU with {what} {value} {unit}; expected more than 0")
    if memory and rate:
        return Gpu(f"{memory:g} GB", 1e9 * memory, 1e12 * rate, "the command line")
    gpu = choose("GPU", str(name).lower(), GPUS)
    if memory:
        return replace(gpu, name=f"{memory:g} GB at {gpu.name}'s rate", memory=1e9 * memory)
    return replace(gpu, name=f"{gpu.name} at {rate:g} TFLOP/s", rate=1e12 * rate) if rate else gpu
