import math

import pytest
import torch
import torch.nn.functional as F

from m2rnn.layers import DecayGate


def test_gate_is_its_formula() -> None:
    gate = DecayGate(3)
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    dt = torch.log1p(torch.exp(logits + gate.dt_bias.double()))
    expected = torch.exp(-gate.A_log.double().exp() * dt)
    log_f, step_size = gate(logits)
    assert torch.allclose(log_f.exp(), expected, rtol=1e-12)
    assert torch.allclose(step_size, dt, rtol=1e-12)
    assert log_f.dtype == step_size.dtype == torch.float64
    assert {x.dtype for x in gate(logits.bfloat16())} == {torch.float32}
    assert gate(torch.tensor([[-1e4] * 3, [1e4] * 3]))[0].exp().tolist() == [[1.0] * 3, [0.0] * 3]


def test_initial_ranges() -> None:
    gate = DecayGate(20_000)
    A, dt = gate.A_log.exp(), F.softplus(gate.dt_bias)
    assert 0 < A.min() < 0.01
    assert 15.9 < A.max() <= 16
    assert A.mean().item() == pytest.approx(8, rel=0.02)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    assert dt.log().mean().item() == pytest.approx(math.log(1e-2), rel=0.01)  # log-uniform between 1e-3 and 1e-1
    gate = DecayGate(1000, A_range=(4, 4), dt_range=(1e-6, 1e-5), dt_floor=2e-4)
    assert torch.allclose(gate.A_log.exp(), torch.tensor(4.0))
    assert torch.allclose(F.softplus(gate.dt_bias), torch.tensor(2e-4), rtol=1e-3)
    gate = DecayGate(1000, A_range=(0, 2e-4))
    assert gate.A_log.exp().min() >= 0.99e-4  # a draw of 0 would have an infinite logarithm


def test_parameters_stay_float32_in_a_16_bit_model() -> None:
    gate = DecayGate(4)
    before = gate.A_log.detach().clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), gate).to(torch.bfloat16).half()
    assert model[0].weight.dtype == torch.float16
    assert torch.equal(gate.A_log, before)
    assert gate.dt_bias.dtype == torch.float32
    assert gate.double().A_log.dtype == torch.float64
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert DecayGate(4).A_log.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("options", [{"A_range": (3, 2)}, {"A_range": (-1, 2)}, {"A_range": (0, 0)}])
def test_bad_A_range_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="A_range"):
        DecayGate(2, **options)


@pytest.mark.parametrize("options", [{"dt_range": (0, 1)}, {"dt_range": (2, 1)}, {"dt_floor": 0}])
def test_bad_dt_range_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="dt_range"):
        DecayGate(2, **options)
