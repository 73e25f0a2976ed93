"""The linear layer at the end of a mixer or an MLP."""

from torch import nn


class OutputProjection(nn.Linear):
    """A linear layer without bias that adds to the residual stream; deep models start it narrower."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
