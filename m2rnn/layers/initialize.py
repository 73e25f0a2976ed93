"""In-place initialisation that leaves values read from a checkpoint alone."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def initialize(parameter: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Run the in-place ``fill(parameter)`` unless transformers has marked the parameter as loaded.

    ``fill`` works in place, in several steps if need be (draw, then transform), so it also works on sharded
    parameters. The mark is the one that transformers' own initialisation functions look at.
    """
    if not getattr(parameter, "_is_hf_initialized", False):
        fill(parameter)
