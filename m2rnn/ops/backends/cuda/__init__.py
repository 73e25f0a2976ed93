"""CUDA kernels compiled by NVRTC: compiler and launches."""
