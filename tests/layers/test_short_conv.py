import pytest
import torch
import torch.nn.functional as F

from m2rnn.layers import ShortConv
from tests.tolerances import assert_close


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("steps", [0, 1, 3, 9])
def test_convolution_is_the_sum_over_taps(width: int, steps: int, activation: str | None) -> None:
    conv = ShortConv(3, width, activation).double()
    x, state = torch.randn(2, steps, 3).double(), torch.randn(2, width - 1, 3).double()
    y, final = conv(x, state)
    before = torch.cat([state, x], 1)
    for t in range(steps):
        expected = sum(conv.weight[:, 0, i] * before[:, t + i] for i in range(width))
        if activation == "silu":
            expected = expected / (1 + torch.exp(-expected))
        assert_close(y[:, t], expected, torch.float64, "output")
    assert torch.equal(final, before[:, before.shape[1] - (width - 1) :])


def test_no_state_is_zero_state() -> None:
    conv = ShortConv(3, 4, None)
    x = torch.randn(2, 5, 3)
    assert torch.equal(conv(x)[0], conv(x, torch.zeros(2, 3, 3))[0])
    weight = conv.weight.transpose(0, 1)
    assert torch.allclose(conv(x)[0][:, 0], F.linear(x[:, 0], torch.diag(weight[0, :, -1])))


def test_weights_start_uniform_in_the_inverse_root_of_the_width() -> None:
    weight = ShortConv(5000, 4).weight
    assert weight.abs().max() <= 0.5
    assert weight.std().item() == pytest.approx(1 / 12**0.5, rel=0.05)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ShortConv(3, 0)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        ShortConv(3, 4, "relu")
