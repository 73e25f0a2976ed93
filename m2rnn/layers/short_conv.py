"""Depthwise causal convolution over time with a state, for dense and packed sequences."""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.layers.initialize import initialize
from m2rnn.layers.packing import Packing
from m2rnn.layers.sizes import check_sizes
from m2rnn.layers.state import M2RNNState
from m2rnn.ops.short_conv import is_fast, short_conv


class ShortConv(nn.Module):
    """``y_t = activation(Σ_i weight[:, 0, i] ⊙ x_{t - width + 1 + i} + bias)``, each channel on its own.

    The state holds the last ``width - 1`` inputs of each sequence, zeros before its first token, so that
    any split of a sequence into calls gives the same outputs. On a GPU, sequences without a state take
    the fused kernels of ``m2rnn.ops.short_conv``. Initialised uniformly in ±1/√width unless ``init_std`` says
    otherwise, a bias at 0.

    Args:
        channels: number of channels C.
        width: number of taps, at least 1.
        activation: ``"silu"`` or None.
        bias: whether there is one; it takes no weight decay.
        init_std: s, to start the weights from N(0, s²); None for U(±1/√width).

    Raises:
        ValueError: for a width below 1, an unknown activation, or an ``init_std`` that is not positive and finite.
    """

    _no_weight_decay = ("bias",)

    def __init__(
        self,
        channels: int,
        width: int = 4,
        activation: str | None = "silu",
        *,
        bias: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(width=width)
        check_activation(activation)
        check_init_std(init_std=init_std)
        self.width = width
        self.activation = activation
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std, bound = self.init_std, self.width**-0.5
        if std is None:
            initialize(self.weight, lambda weight: weight.uniform_(-bound, bound))
        else:
            initialize(self.weight, lambda weight: weight.normal_(0, std))
        if self.bias is not None:
            initialize(self.bias, lambda bias: bias.zero_())

    def forward(
        self, x: Tensor, state: Tensor | None = None, packing: Packing | None = None, *, output_state: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` [B, T, C] and ``state`` [B, width - 1, C] to the output and the new state, of the same
        shapes; None as the state unless ``output_state``.

        With ``packing``, x is ``[1, total, C]`` and the states are those of its N sequences.
        """
        if state is None and is_fast(x, self.weight):
            starts = None if packing is None else packing.starts
            y = short_conv(x, self.weight.squeeze(1), self.bias, silu=self.activation == "silu", starts=starts)
            return y, self._last_inputs(x, packing) if output_state else None
        past = self.width - 1
        final_state = None
        if packing is None:
            if state is None:
                state = x.new_zeros(x.shape[0], past, x.shape[2])
            extended = torch.cat([state.to(x.dtype), x], 1)
            y = self._convolve(extended)
            if output_state:  # a view would keep all inputs alive
                final_state = extended[:, extended.shape[1] - past :].clone()
        else:
            # In the extended row each sequence follows its own `past` inputs, so no output sees a neighbour.
            shift = packing.sequence_ids * past
            index = torch.arange(x.shape[1], device=x.device) + shift
            starts = packing.cu_seqlens[:-1] + torch.arange(packing.rows, device=x.device) * past
            window = torch.arange(past, device=x.device)
            extended_row = x.new_zeros(x.shape[1] + packing.rows * past, x.shape[2])
            extended_row = extended_row.index_copy(0, index + past, x[0])
            if state is not None:
                rows = (starts[:, None] + window).flatten()
                extended_row = extended_row.index_copy(0, rows, state.to(x.dtype).flatten(0, 1))
            y = self._convolve(extended_row[None]).index_select(1, index)
            if output_state:
                final_state = extended_row[(starts + packing.lengths)[:, None] + window]
        return F.silu(y) if self.activation == "silu" else y, final_state

    def _last_inputs(self, x: Tensor, packing: Packing | None) -> Tensor:
        """The state after sequences that started from none."""
        past = self.width - 1
        if packing is None:
            last = x[:, max(0, x.shape[1] - past) :]
            return F.pad(last, (0, 0, past - last.shape[1], 0)) if last.shape[1] < past else last.clone()
        if not x.shape[1]:  # nothing to index
            return x.new_zeros(packing.rows, past, x.shape[2])
        index = packing.cu_seqlens[1:, None] - past + torch.arange(past, device=x.device)
        real = index >= packing.cu_seqlens[:-1, None]
        return x[0][index.clamp(min=0)].masked_fill(~real[..., None], 0)

    def _convolve(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.width or not x.shape[0]:  # no token: conv1d refuses
            return x[:, : max(0, x.shape[1] - self.width + 1)]
        return F.conv1d(x.transpose(1, 2), self.weight, self.bias, groups=x.shape[2]).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.width}, activation={self.activation!r}"


def convolve(
    x: Tensor,
    conv: ShortConv | None,
    activation: str | None,
    state: M2RNNState | None,
    packing: Packing | None,
    *,
    output_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """``x`` [B, T, C] through a mixer's convolution, or its activation alone if it has none; and ``conv``'s new state.

    ``state`` is the mixer's, whose part ``conv`` this reads.
    """
    if conv is None:
        return F.silu(x) if activation == "silu" else x, None
    mixed: tuple[Tensor, Tensor | None] = conv(
        x, None if state is None else state.conv, packing, output_state=output_state
    )
    return mixed


def check_init_std(**stds: object) -> None:
    """Raise a ValueError for a standard deviation that is not a positive finite number, by its name; None is another
    start."""
    for name, std in stds.items():
        number = isinstance(std, Real) and not isinstance(std, bool)
        if std is not None and not (number and 0 < std < math.inf):  # type: ignore[operator]
            raise ValueError(
                f"{name} must be a positive number, the standard deviation that weights start with, or None for the "
                f"uniform start, got {std!r}"
            )


def check_activation(activation: str | None) -> None:
    """Raise a ValueError unless ``activation`` is one that the layers offer."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
