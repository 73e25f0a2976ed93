"""How fast a training runs, and how much of the device's peak that is."""

import re
import time

import torch

# Dense bfloat16 FLOP/s by the name that CUDA gives; from the makers' data sheets. The first that fits counts.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("GB200", 2500e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)
UNTIMED_STEPS = 5  # compilation and the caches' first filling


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of bfloat16 matrix products, or None if the device is not in ``PEAKS``."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """``peak_flops`` of the device that CUDA calls so; laptops' are others of the same number."""
    if "Laptop" in name:
        return None
    return next((peak for part, peak in PEAKS if re.search(rf"\b{part}\b", name)), None)


class Throughput:
    """Tokens per second of single steps and of all but the first ``UNTIMED_STEPS`` since the process started.

    Args:
        tokens: of a step, in all processes.
        flops: of a token, forward and backward.
        peak: of all devices together, if known.
    """

    def __init__(self, tokens: int, flops: int, peak: float | None) -> None:
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self.steps = 0
        self.last = 0.0
        self._timed_seconds = 0.0
        self._began = time.monotonic()

    def step(self) -> None:
        """A step ended."""
        now = time.monotonic()
        self.last = self.tokens / max(now - self._began, 1e-9)
        self.steps += 1
        if self.steps > UNTIMED_STEPS:
            self._timed_seconds += now - self._began
        self._began = now

    @property
    def mean(self) -> float:
        timed = self.steps - UNTIMED_STEPS
        return timed * self.tokens / self._timed_seconds if timed > 0 else self.last

    def utilisation(self, tokens_per_second: float) -> float | None:
        """MFU: the model's own operations per second as a share of the peak."""
        return None if self.peak is None else tokens_per_second * self.flops / self.peak
