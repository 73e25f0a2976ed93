"""The CUDA backend: NVIDIA kernels in CUDA C++."""

from m2rnn.ops.scan.cuda.launch import backward, forward, saved_like, why_not

__all__ = ["backward", "forward", "saved_like", "why_not"]
