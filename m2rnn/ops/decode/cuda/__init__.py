"""The decoding operators' CUDA kernels."""
