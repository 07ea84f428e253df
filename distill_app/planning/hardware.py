"""What devices can do: GPUs by their data sheets, this machine's CPU by a measurement of a second."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GB = 10**9
MEASURED_SIZE = 2048  # rows and columns of the product that is timed
MEASURED_BYTES = 256 * 10**6
ROUNDS = 5


@dataclass(frozen=True)
class Device:
    """A device's peaks, and the share of them that our work reaches.

    The shares of the CPU are fitted to one default run (docs/planning.md). Those of GPUs are assumptions:
    about a third of the peak is what trainings of small models report (MFU), 60 % of the bandwidth what
    decoding reaches. No run of ours has measured them.
    """

    name: str
    memory: int  # bytes
    flops: float  # dense bfloat16 operations a second; on a CPU those of its compute dtype
    bandwidth: float  # bytes a second
    flops_share: float = 0.35  # of flops
    bandwidth_share: float = 0.6  # of bandwidth
    layer_sec: float = 5e-5  # of a layer in a pass, whatever it holds: launching kernels
    step_bytes: int = 60  # moved a parameter in an optimizer's step
    start_sec: float = 30.0  # of a process: imports, loading weights, for vLLM also compiling

    @property
    def reached_flops(self) -> float:
        """Return the operations a second that our work reaches."""
        return self.flops * self.flops_share

    @property
    def reached_bandwidth(self) -> float:
        """Return the bytes a second that our work reaches."""
        return self.bandwidth * self.bandwidth_share

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


def _gpu(name: str, memory_gb: int, tflops: float, bandwidth_gb: float) -> Device:
    return Device(name, memory_gb * GB, tflops * 1e12, bandwidth_gb * GB)


# Memory, dense bfloat16 TFLOP/s (data sheets with sparsity name twice as many) and memory bandwidth
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h200", 141, 989, 4800),  # NVIDIA H200 data sheet, SXM
        _gpu("h100", 80, 989, 3350),  # NVIDIA H100 data sheet, SXM5: 1,979 with sparsity
        _gpu("a100-40g", 40, 312, 1555),  # NVIDIA A100 data sheet, 40 GB: 312 dense, 624 with sparsity
        _gpu("l40s", 48, 362, 864),  # NVIDIA L40S data sheet: 362 dense, 733 with sparsity
        _gpu("l4", 24, 121, 300),  # NVIDIA L4 data sheet: 242 with sparsity
    )
}


def this_cpu() -> Device:
    """Return this machine's CPU, its products and bandwidth measured with the threads that torch uses."""
    import psutil
    import torch

    from distill_app.core.models import compute_dtype

    dtype = getattr(torch, compute_dtype())
    one = torch.randn(MEASURED_SIZE, MEASURED_SIZE).to(dtype)
    many = torch.zeros(MEASURED_BYTES // 4)
    product, addition = _seconds(lambda: one @ one), _seconds(lambda: many.add_(1))
    return cpu(2 * MEASURED_SIZE**3 / product, 2 * MEASURED_BYTES / addition, psutil.virtual_memory().total)


def cpu(flops: float, bandwidth: float, memory: int) -> Device:
    """Return a CPU that has been measured.

    An optimizer's step moves much more than its bytes: gradients are summed in float32 and clipped, and
    batches are small.
    """
    return Device(
        "cpu",
        memory,
        flops,
        bandwidth,
        flops_share=0.7,
        bandwidth_share=1.0,
        layer_sec=1.2e-3,
        step_bytes=280,
        start_sec=5.0,
    )


def _seconds(work: Callable[[], Any]) -> float:
    """Return the median of some rounds, after one that warms up."""
    work()
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)
