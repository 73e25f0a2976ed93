import pytest
import torch
import torch.nn.functional as F

from m2rnn.layers import GRU, M2RNN, RNN, GatedDeltaNet, Mamba2, Packing, ShortConv, short_conv
from tests.ops.short_conv.test_short_conv import DEVICE
from tests.ops.triton_runs import runs_triton
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


@pytest.mark.parametrize("std", [0.02, 1, 3.0])
def test_weights_start_normal_with_a_given_standard_deviation(std: float) -> None:
    conv = ShortConv(5000, 4, bias=True, init_std=std)
    for _ in range(2):
        weight = conv.weight.detach()
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * std
        assert (weight.abs() > 2 * std).double().mean().item() == pytest.approx(0.0455, rel=0.2)  # a normal's tails
        assert not conv.bias.any()
        conv.reset_parameters()


@pytest.mark.parametrize("layer", [M2RNN, GatedDeltaNet, Mamba2, RNN, GRU])
def test_mixers_hand_the_start_on_to_their_convolution(layer: type) -> None:
    options = {"conv_size": 4} | ({"num_heads": 3, "key_dim": 300, "value_dim": 300} if layer is GatedDeltaNet else {})
    given = layer(512, **options, conv_init=0.02).conv.weight
    assert given.numel() > 2000
    assert given.std().item() == pytest.approx(0.02, rel=0.05)
    assert 0.49 < layer(512, **options).conv.weight.abs().max() <= 0.5


@pytest.mark.parametrize("std", [0, -0.02, float("inf"), float("nan"), "0.02", True])
def test_a_start_that_is_no_positive_number_is_refused(std: object) -> None:
    with pytest.raises(ValueError, match=f"init_std must be a positive number, .* got {std!r}"):
        ShortConv(3, init_std=std)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ShortConv(3, 0)
    with pytest.raises(ValueError, match="activation must be 'silu' or None, got 'relu'"):
        ShortConv(3, 4, "relu")


@pytest.mark.parametrize("packed", [False, True])
def test_output_does_not_depend_on_whether_the_state_is_wanted(packed: bool) -> None:
    conv, x = ShortConv(3, 4), torch.randn(1, 7, 3)
    packing = Packing.from_cu_seqlens(torch.tensor([0, 2, 7]), 7) if packed else None
    y, state = conv(x, packing=packing, output_state=False)
    assert state is None
    assert torch.equal(y, conv(x, packing=packing)[0])


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_of_a_wider_dtype_is_cast(packed: bool) -> None:
    """As a call under autocast takes it after one without."""
    conv, x, state = ShortConv(3, 4), torch.randn(1, 7, 3), torch.randn(1 + packed, 3, 3).double()
    packing = Packing.from_cu_seqlens(torch.tensor([0, 2, 7]), 7) if packed else None
    for result, expected in zip(conv(x, state, packing), conv(x, state.float(), packing), strict=True):
        assert result is not None
        assert torch.equal(result, expected)
        assert result.dtype == torch.float32


def test_a_state_does_not_keep_all_inputs_alive() -> None:
    conv, x = ShortConv(3, 4), torch.randn(2, 50, 3)
    for state in (conv(x)[1], conv._last_inputs(x, None)):  # the second is what the fused kernels' caller takes
        assert state is not None
        assert torch.equal(state, x[:, -3:])
        assert state.untyped_storage().nbytes() == state.nbytes


@runs_triton
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("lengths", [None, (2, 0, 5, 1, 33), (1,), (0, 0), ()], ids=str)
@pytest.mark.parametrize(("width", "bias"), [(4, False), (1, True)])
def test_fused_kernels_give_the_output_states_and_gradients_of_pytorch(
    lengths: tuple[int, ...] | None, width: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    conv = ShortConv(5, width, bias=bias).to(DEVICE)
    for steps in (2, 35) if lengths is None else (sum(lengths),):
        packing = None
        if lengths is not None:
            packing = Packing.from_cu_seqlens(torch.tensor([0, *lengths], device=DEVICE).cumsum(0), steps)
        x = torch.randn(2 if packing is None else 1, steps, 5, device=DEVICE, requires_grad=True)
        results = []
        for fused in (False, True):
            monkeypatch.setattr(short_conv, "is_fast", lambda *_, fused=fused: fused)
            y, state = conv(x, packing=packing)
            if not results:
                cotangents = torch.randn_like(y), torch.randn_like(state)
            inputs = [x, *conv.parameters()]  # of which PyTorch uses none if there is no token
            loss = (y * cotangents[0]).sum() + (state * cotangents[1]).sum()
            results.append((y, state, *torch.autograd.grad(loss, inputs, materialize_grads=True)))
        for fused_x, expected in zip(results[1], results[0], strict=True):
            assert_close(fused_x, expected, torch.float32, "gradient")
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_layer_on_a_gpu_takes_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, under autocast, with a part of a projection as its input."""
    taken = []
    kernel = torch.ops.m2rnn.short_conv
    conv = ShortConv(64).to(DEVICE)
    projected = torch.randn(2, 70, 100, device=DEVICE)

    def convolve(projected: torch.Tensor) -> torch.Tensor:
        return conv(projected.split([64, 36], -1)[0], output_state=False)[0]

    expected = convolve(projected)
    monkeypatch.setattr(short_conv, "short_conv", lambda *a, **o: taken.append(1) or kernel(*a, None, o["silu"]))
    assert torch.equal(convolve(projected), expected)
    assert taken
    monkeypatch.undo()
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.compile(convolve, fullgraph=True)(projected.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, torch.bfloat16, "output")
