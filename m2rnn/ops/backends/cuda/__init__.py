"""CUDA kernels compiled by NVRTC when they first run: compiler and launches."""

import importlib.util

import torch


def why_unavailable() -> str | None:
    """Why no kernel of this backend can run here, or None."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no NVIDIA GPU that PyTorch can use"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "cuda-core is not installed: pip install 'm2rnn[gpu]'"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # what it raises differs between its versions
        return f"NVRTC, CUDA's run-time compiler, does not load ({error}): pip install nvidia-cuda-nvrtc"
    return None
