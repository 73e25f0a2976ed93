"""Whether a recurrent state stays bounded beyond the training length: the spectrum of W, and the size of the state.

For a small state H a step of M2RNN is H (f + (1 - f) W) + …. Along an eigenvector of W with an eigenvalue above 1 the
state grows at any forget gate, far beyond the training length, until tanh stops it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from m2rnn.layers import M2RNN
from m2rnn.models.cache import M2RNNCache
from m2rnn.models.model import M2RNNModel


def spectra(model: nn.Module) -> list[dict[str, Any]]:
    """The largest |eigenvalue| and the largest singular value of each head's W, by layer, in float64 on the CPU.

    Args:
        model: any module; M2RNN layers that are swapped into another's model count too.

    Returns:
        For each M2RNN layer, in order, its number (``layer``), how many matrices it has (``heads``), and over these
        the largest and the median: ``largest_eigenvalue``, ``median_eigenvalue``, ``largest_singular_value`` and
        ``median_singular_value``. Empty without such layers.
    """
    found: list[dict[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, M2RNN):
            weight = module.state_weight.detach().double().cpu()
            eigenvalues = torch.linalg.eigvals(weight).abs().amax(-1).numpy()
            singular_values = torch.linalg.matrix_norm(weight, 2).numpy()
            numbers = [int(part) for part in name.split(".") if part.isdecimal()]
            found.append(
                {
                    "layer": numbers[0] if numbers else len(found),
                    "heads": len(weight),
                    "largest_eigenvalue": float(eigenvalues.max()),
                    "median_eigenvalue": float(np.median(eigenvalues)),
                    "largest_singular_value": float(singular_values.max()),
                    "median_singular_value": float(np.median(singular_values)),
                }
            )
    return found


def recurrent_layers(model: nn.Module) -> dict[int, str]:
    """Numbers and mixers of the layers that keep a recurrent state; none of a model of a foreign class."""
    stack = getattr(model, "base_model", model)
    if not isinstance(stack, M2RNNModel):
        return {}
    return {layer: mixer for layer, mixer in enumerate(stack.config.mixers) if mixer != "attention"}


def rms_of_states(cache: M2RNNCache, layers: Sequence[int]) -> Tensor:
    """Root mean square of each sequence's recurrent state ``[B, layers]``, over all of its heads and components."""
    states = [cache.layers[layer].state.recurrent.flatten(1) for layer in layers]
    rms = [torch.linalg.vector_norm(state, dim=1) / state.shape[1] ** 0.5 for state in states]
    return torch.stack([each.to(rms[0].device) for each in rms], 1)


def summary_of_states(
    table: NDArray[np.float32], layers: dict[int, str], positions: Sequence[int]
) -> list[dict[str, Any]]:
    """``table`` ``[windows, positions, layers]`` as rows of a layer each: the mean over windows by position."""
    means = table.astype(np.float64).mean(0)
    return [
        {"layer": layer, "mixer": mixer, "positions": list(positions), "rms": means[:, n].tolist()}
        for n, (layer, mixer) in enumerate(layers.items())
    ]
