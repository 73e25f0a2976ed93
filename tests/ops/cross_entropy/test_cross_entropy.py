"""The fused loss: its kernel under Triton's interpreter, and the gradients made in the forward pass."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2rnn.models.loss import chunked_cross_entropy
from m2rnn.ops import cross_entropy
from m2rnn.ops.cross_entropy import linear_cross_entropy
from m2rnn.ops.cross_entropy.operator import _even_chunks
from tests.ops.ahead_of_time import compile_kernels
from tests.ops.triton_runs import GPU, runs_triton
from tests.tolerances import TOLERANCES, assert_close

pytest.importorskip("triton")
pytestmark = [runs_triton, pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")]  # NumPy's, of NaN
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few columns are many blocks, as a vocabulary is."""
    from m2rnn.ops.cross_entropy import triton as cross_entropy_triton

    monkeypatch.setattr(cross_entropy_triton, "BLOCK", 64)


def problem(rows: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rounded to the dtype, so that the reference in float64 sees the same numbers."""
    hidden = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = torch.randn(vocabulary, width, device=DEVICE).to(dtype)
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    labels[1::4] = -100
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, cotangent: float) -> list[Tensor]:
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    return [loss, *torch.autograd.grad(loss, [hidden, weight], torch.tensor(cotangent, device=loss.device).double())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "chunk_size"), [(64, None), (200, 7), (131, 3)])
def test_fused_loss_and_gradients_are_the_plain_ones(
    dtype: torch.dtype, vocabulary: int, chunk_size: int | None
) -> None:
    hidden, weight, labels = problem(17, vocabulary, 24, dtype)
    inputs = [x.float().requires_grad_() for x in (hidden, weight)]  # float32 weights, as in training
    loss = linear_cross_entropy(*inputs, labels, dtype, chunk_size)
    found = [loss, *torch.autograd.grad(loss, inputs, torch.tensor(-0.37, device=DEVICE))]
    assert [x.dtype for x in found] == [torch.float32] * 3
    for ours, theirs, kind in zip(
        found, reference(hidden, weight, labels, -0.37), ["output", "gradient", "gradient"], strict=True
    ):
        assert_close(ours, theirs, dtype, kind)


def test_gradient_of_a_certain_token_keeps_its_digits() -> None:
    """p - 1 in 16 bits from p in 16 bits would be 0: the gradient is rounded once."""
    logits = torch.zeros(1, 64, dtype=torch.bfloat16, device=DEVICE)
    logits[0, 5] = 12
    exact = logits.double().softmax(1)
    exact[0, 5] -= 1
    from m2rnn.ops.cross_entropy.triton import to_gradient_

    losses = torch.empty(1, device=DEVICE)
    to_gradient_(logits, torch.tensor([5], device=DEVICE), losses, 64)
    assert_close(logits, exact, torch.bfloat16, "gradient")
    assert losses.item() == pytest.approx(-(1 + exact[0, 5]).log().item(), abs=1e-6)


def test_gradients_of_many_chunks_add_up() -> None:
    """300 small numbers of one sign, of which a sum in bfloat16 would lose what comes after 256."""
    hidden, weight, labels = problem(1, 64, 8, torch.bfloat16)
    weight = weight.float().requires_grad_()
    linear_cross_entropy(hidden.expand(300, -1), weight, labels.expand(300), torch.bfloat16, 1).backward()
    assert_close(weight.grad, 300 * reference(hidden, weight, labels, 1.0)[2], torch.bfloat16, "gradient")


def test_only_wanted_gradients_are_computed() -> None:
    hidden, weight, labels = problem(9, 100, 8, torch.bfloat16)
    full = reference(hidden, weight, labels, 1.0)
    for wanted in (0, 1):
        inputs = [hidden.clone(), weight.clone()]
        inputs[wanted].requires_grad_()
        linear_cross_entropy(*inputs, labels, torch.bfloat16).backward()
        assert inputs[1 - wanted].grad is None
        assert_close(inputs[wanted].grad, full[1 + wanted], torch.bfloat16, "gradient")


def test_what_is_wrong_shows() -> None:
    hidden, weight, labels = problem(6, 100, 8, torch.float32)
    for label in (100, -1):
        labels[2] = label
        assert linear_cross_entropy(hidden, weight, labels, torch.float32).isnan()
    labels[2] = 0
    assert linear_cross_entropy(hidden, weight, labels, torch.float32).isfinite()
    hidden[2, 0] = torch.nan
    assert linear_cross_entropy(hidden, weight, labels, torch.float32).isnan()
    empty = linear_cross_entropy(hidden[:0].requires_grad_(), weight, labels[:0], torch.float32)
    assert empty.item() == 0
    empty.backward()


def test_a_step_of_rows_is_cut_evenly() -> None:
    assert _even_chunks(32_768, 100_352) == 4736  # seven of them
    assert _even_chunks(100, 512) == 128
    assert _even_chunks(1000, 2**40) == 128


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The fused loss wherever the kernel can be interpreted; the dtypes it was used with."""
    used: list[torch.dtype] = []

    def recorded(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, *rest) -> Tensor:
        used.append(dtype)
        return linear_cross_entropy(hidden, weight, labels, dtype, *rest)

    monkeypatch.setattr(cross_entropy, "why_not", lambda hidden, weight, dtype: None)
    monkeypatch.setattr(cross_entropy, "linear_cross_entropy", recorded)
    return used


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(7)])
def test_models_loss_is_the_fused_one(anywhere: list[torch.dtype], num_items) -> None:
    head = nn.Linear(8, 100, bias=False, device=DEVICE)
    hidden = torch.randn(2, 6, 8, device=DEVICE, requires_grad=True)
    labels = torch.randint(100, (2, 6), device=DEVICE)
    labels[0, 3:] = -100
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = chunked_cross_entropy(hidden, labels, head, 100, num_items)
        with torch.no_grad():  # and the other way
            expected = chunked_cross_entropy(hidden, labels, head, 100, num_items)
    assert anywhere == [torch.bfloat16]
    assert_close(loss, expected, torch.bfloat16, "output")
    loss.backward()
    count = (labels != -100).sum() if num_items is None else num_items
    exact = reference(hidden.flatten(0, 1), head.weight, labels.flatten(), 1 / float(count))
    error = TOLERANCES[torch.bfloat16]["gradient"]
    assert ((hidden.grad.flatten(0, 1) - exact[1]).norm() / exact[1].norm()).item() < error
    assert ((head.weight.grad - exact[2]).norm() / exact[2].norm()).item() < error


def test_heads_that_are_more_than_a_product_are_called(anywhere: list[torch.dtype]) -> None:
    hidden, labels = torch.randn(5, 8, device=DEVICE), torch.randint(10, (5,), device=DEVICE)
    hooked = nn.Linear(8, 10, bias=False, device=DEVICE)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    biased = nn.Linear(8, 10, device=DEVICE)
    for head in (hooked, biased, lambda x: x.repeat(1, 2)[:, :10]):
        loss = chunked_cross_entropy(hidden, labels, head, 10)
        assert_close(loss, F.cross_entropy(head(hidden), labels), torch.float32, "output")
    assert anywhere == []


@pytest.mark.parametrize(
    ("device", "dtype", "reason"), [("cpu", torch.bfloat16, "needs a GPU"), ("meta", torch.bfloat16, "needs a GPU")]
)
def test_elsewhere_the_loss_is_in_pytorch(device: str, dtype: torch.dtype, reason: str) -> None:
    x = torch.empty(2, 2, device=device)
    assert reason in cross_entropy.why_not(x, x, dtype)


COMPILE = """
from m2rnn.ops.cross_entropy.triton import to_gradient_

for capability, vocabulary in (90, 100352), (80, 50257):
    logits = torch.zeros(1, -(-vocabulary // 64) * 64, dtype=torch.bfloat16)
    to_gradient_(logits, torch.zeros(1, dtype=torch.int64), torch.zeros(1), vocabulary)
for kernel in kernels:
    loads = kernel.asm["ptx"].count("ld.global.v4"), kernel.asm["ptx"].count("st.global.v4")
    assert kernel.asm["cubin"] and loads == (4, 2), loads
assert len(kernels) == 2
"""


def test_kernel_compiles_ahead_of_time_to_wide_loads(tmp_path: Path) -> None:
    compile_kernels(COMPILE, tmp_path)
