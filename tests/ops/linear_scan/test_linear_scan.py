"""The linear recurrences: chunks in PyTorch and fla's kernels against the definition, a token at a time in float64."""

import inspect
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from m2rnn.ops.linear_scan import fla
from m2rnn.ops.linear_scan import operator as linear_scan
from m2rnn.ops.linear_scan.operator import gated_delta_scan, gated_linear_scan
from tests.tolerances import TOLERANCES, assert_close, relative_error

FLOAT64 = torch.float64
needs_fla = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("fla") is None, reason="needs a GPU and flash-linear-attention"
)


@dataclass(frozen=True)
class Case:
    """Sequences and sizes; writes 0 is gated linear attention, whose heads share ``groups`` queries and keys."""

    lengths: tuple[int, ...]
    packed: bool = False
    writes: int = 1
    heads: int = 2
    groups: int = 1
    key: int = 4
    value: int = 3
    decay: float = 0.3
    state: bool = True

    def tensors(self, dtype: torch.dtype = FLOAT64) -> dict[str, Tensor]:
        """Inputs, all of which want a gradient; q, k and v are rounded to ``dtype``, the rest has the state's dtype."""
        generator = torch.Generator().manual_seed(hash(self) % 2**31)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=FLOAT64, generator=generator)

        batch, steps = (1, sum(self.lengths)) if self.packed else (len(self.lengths), self.lengths[0])
        heads = self.heads if self.writes else self.groups
        writes = (self.writes,) if self.writes else ()
        q, k = normal(batch, steps, heads, self.key), normal(batch, steps, *writes, heads, self.key)
        v = normal(batch, steps, *writes, self.heads, self.value)
        inputs = {"q": q / self.key**0.5, "k": torch.nn.functional.normalize(k, dim=-1), "v": v}
        inputs["log_decay"] = -self.decay * normal(batch, steps, self.heads).exp()
        if self.writes:
            inputs["beta"] = 2 * normal(batch, steps, *writes, self.heads).sigmoid()
        if self.state:
            inputs["initial_state"] = normal(len(self.lengths), self.heads, self.key, self.value)
        wide = FLOAT64 if dtype == FLOAT64 else torch.float32
        return {
            name: x.to(dtype if name in "qkv" else wide).detach().requires_grad_() for name, x in inputs.items()
        }  # fmt: skip

    def offsets(self) -> Tensor | None:
        return torch.tensor([0, *self.lengths]).cumsum(0) if self.packed else None

    def scan(self, inputs: dict[str, Tensor], backend: str | None = "torch", device: str = "cpu") -> list[Tensor]:
        """Output and final states."""
        offsets = self.offsets()
        scan = gated_delta_scan if self.writes else gated_linear_scan
        moved = {name: x.to(device) for name, x in inputs.items()}
        return list(scan(**moved, cu_seqlens=None if offsets is None else offsets.to(device), backend=backend))


def definition(case: Case, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Output and final states in float64: every sequence, token, head and write on its own."""
    x = {name: value.double() for name, value in inputs.items()}
    initial = x.get("initial_state")
    outputs, states = [], []
    start = 0
    for n, length in enumerate(case.lengths):
        row, first = (0, start) if case.packed else (n, 0)
        start += length
        heads, finals = [], []
        for h in range(case.heads):
            S = torch.zeros(case.key, case.value, dtype=FLOAT64) if initial is None else initial[n, h]
            source = h if case.writes else h // (case.heads // case.groups)
            steps = []
            for t in range(first, first + length):
                S = torch.exp(x["log_decay"][row, t, h]) * S
                if case.writes:
                    for j in range(case.writes):
                        k, v = x["k"][row, t, j, h], x["v"][row, t, j, h]
                        S = S + x["beta"][row, t, j, h] * torch.outer(k, v - S.T @ k)
                else:
                    S = S + torch.outer(x["k"][row, t, source], x["v"][row, t, h])
                steps.append(S.T @ x["q"][row, t, source])
            heads.append(torch.stack(steps) if steps else S.new_zeros(0, case.value))
            finals.append(S)
        outputs.append(torch.stack(heads, 1))
        states.append(torch.stack(finals))
    y = torch.cat(outputs)[None] if case.packed else torch.stack(outputs)
    return [y, torch.stack(states)]


def check(case: Case, dtype: torch.dtype, backend: str = "torch", device: str = "cpu", factor: float = 1.0) -> None:
    """Results and gradients, against random cotangents, are the definition's for the same inputs."""
    inputs = case.tensors(dtype)
    actual, expected = case.scan(inputs, backend, device), definition(case, inputs)
    cotangents = [torch.randn_like(x) for x in expected]
    ours = torch.autograd.grad(
        actual, list(inputs.values()), [c.to(x) for c, x in zip(cotangents, actual, strict=True)]
    )
    theirs = torch.autograd.grad(expected, list(inputs.values()), cotangents)
    for kind, one, other in zip(("output", "state"), actual, expected, strict=True):
        assert relative_error(one, other) <= factor * TOLERANCES[dtype][kind], kind
    for name, one, other in zip(inputs, ours, theirs, strict=True):
        assert relative_error(one, other) <= factor * TOLERANCES[dtype]["gradient"], name


CASES = {
    "delta": Case((70, 70)),
    "delta, a chunk": Case((32,)),
    "delta, no state": Case((33,), state=False),
    "delta, two writes": Case((37, 37), writes=2),
    "delta, three writes": Case((25,), writes=3, value=5),
    "delta, packed": Case((5, 0, 70, 1, 33, 0), packed=True),
    "delta, two writes, packed": Case((17, 40, 0), packed=True, writes=2),
    "delta, a token": Case((1, 1), writes=2),
    "linear": Case((70, 70), writes=0),
    "linear, groups": Case((40,), writes=0, heads=6, groups=2),
    "linear, packed": Case((5, 0, 70, 1, 33), packed=True, writes=0, heads=3),
    "linear, no state": Case((33,), writes=0, state=False),
    "linear, a token": Case((1, 1), writes=0, heads=4, groups=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_are_the_definition(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype)


@pytest.mark.parametrize("writes", [0, 1, 2])
@settings(max_examples=8)
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 32, 33, 50]), min_size=1, max_size=4))
@example(lengths=[0, 1, 0])  # one token, as in decoding, but not of each sequence
def test_packed_sequences_of_any_lengths(writes: int, lengths: list[int]) -> None:
    case = Case(tuple(lengths), packed=True, writes=writes, heads=1, key=2, value=2)
    if sum(lengths):
        check(case, FLOAT64)
    else:
        inputs = case.tensors()
        y, state = case.scan(inputs)
        assert y.shape == (1, 0, 1, 2)
        assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("writes", [0, 1])
def test_nothing_flows_from_one_packed_sequence_to_another(writes: int) -> None:
    case = Case((20, 40, 3), packed=True, writes=writes)
    inputs = case.tensors()
    y, state = case.scan(inputs)
    names = [name for name in inputs if name != "initial_state"]
    gradients = torch.autograd.grad([y[:, 20:60].square().sum(), state[1].sum()], [inputs[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient[:, :20].abs().max() == 0, name
        assert gradient[:, 60:].abs().max() == 0, name
        assert gradient[:, 20:60].abs().max() > 0, name


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_forgetting_at_once_keeps_the_precision_of_what_is_left(writes: int) -> None:
    """Sums of log decays reach -10⁴ in a chunk; what follows depends on small differences of them."""
    case = Case((60,), writes=writes, decay=20.0)
    inputs = case.tensors()
    with torch.no_grad():
        inputs["log_decay"][:, ::2] *= 20
        inputs["log_decay"][:, 20:30] *= 1e-4
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    for one, other in zip(case.scan(single), definition(case, single), strict=True):
        assert relative_error(one, other) < 2e-6


@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("nothing", [-1e5, -1e20, -torch.inf])
def test_forgetting_everything_is_the_definition(nothing: float, writes: int) -> None:
    """Outputs, states and gradients, where exp(g) is 0 whatever the g."""
    case = Case((40,), writes=writes)
    inputs = case.tensors()
    with torch.no_grad():
        inputs["log_decay"][:, [0, 7, 8, 33], 0] = nothing
    actual, expected = case.scan(inputs), definition(case, inputs)
    cotangents = [torch.randn_like(x) for x in expected]
    ours = torch.autograd.grad(actual, list(inputs.values()), cotangents)
    theirs = torch.autograd.grad(expected, list(inputs.values()), cotangents)
    for one, other in zip([*actual, *ours], [*expected, *theirs], strict=True):
        assert relative_error(one, other) < 1e-10


def test_reflections_stay_bounded() -> None:
    """β = 2 with one key again and again turns the state around at every step; nothing may grow."""
    case = Case((256,), heads=1, decay=0.0)
    inputs = case.tensors()
    with torch.no_grad():
        inputs["beta"].fill_(2)
        inputs["k"][:] = inputs["k"][:, :1]
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    for one, other in zip(case.scan(single), definition(case, single), strict=True):
        assert relative_error(one, other) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["delta, two writes", "linear, groups"])
def test_sixteen_bits_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """The sums are float32: only the output and the gradients of q, k and v are rounded."""
    inputs = CASES[name].tensors(dtype)
    y, state = CASES[name].scan(inputs)
    expected, expected_state = definition(CASES[name], inputs)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(state, expected_state, torch.float32, "state")
    assert relative_error(y, expected) < 0.5 * torch.finfo(dtype).eps
    check(CASES[name], dtype)


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("steps", [1, 40])
def test_an_initial_state_of_another_dtype_is_cast(steps: int, writes: int) -> None:
    case = Case((steps,), writes=writes)
    inputs = case.tensors(torch.float32)
    expected = case.scan(inputs)
    found = case.scan({**inputs, "initial_state": inputs["initial_state"].double()})
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("writes", [0, 1])
def test_autocast_leaves_the_sums_alone(writes: int) -> None:
    case = Case((40,), writes=writes)
    inputs = case.tensors(torch.float32)
    expected = case.scan(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = case.scan(inputs)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_transformers_computes_the_same_rule() -> None:
    case = Case((70, 70))
    x = {name: value.detach() for name, value in case.tensors(torch.float32).items()}
    y, state = case.scan(x)
    expected, expected_state = inspect.unwrap(torch_recurrent_gated_delta_rule)(  # fla would stand in for it
        x["q"] * case.key**0.5,  # it divides by √K itself
        x["k"][:, :, 0],
        x["v"][:, :, 0],
        g=x["log_decay"],
        beta=x["beta"][:, :, 0],
        initial_state=x["initial_state"],
        output_final_state=True,
    )
    assert_close(y, expected, torch.float32, "output")
    assert_close(state, expected_state, torch.float32, "state")


WIDE = {
    "delta": Case((130, 130), key=64, value=128),
    "delta, packed": Case((70, 0, 3, 200), packed=True, key=32, value=64),
    "delta, two writes": Case((130, 130), writes=2, key=64, value=64),
    "delta, two writes, packed": Case((70, 0, 3, 200), packed=True, writes=2, key=32, value=64),
    "linear": Case((130, 130), writes=0, heads=4, key=27, value=19),
    "linear, packed": Case((70, 0, 3, 200), packed=True, writes=0, heads=4, key=64, value=19),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_chunks_on_a_gpu_are_the_definition(name: str) -> None:
    """In deterministic mode, as all tests: PyTorch's sums in no fixed order are errors."""
    check(CASES[name], torch.float32, "torch", "cuda")


@needs_fla
@pytest.mark.parametrize("name", WIDE)
def test_kernels_and_pytorch_agree(name: str) -> None:
    """Both with the definition: the kernels round more often than once, hence twice the tolerance."""
    case = WIDE[name]
    reason = fla.why_not(torch.device("cuda"), torch.bfloat16, case.key, trained=True, delta=case.writes > 0)
    if reason is not None:
        pytest.skip(reason)
    check(case, torch.bfloat16, "torch", "cuda")
    check(case, torch.bfloat16, "fla", "cuda", factor=2.0)


GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A GPU machine that the test describes."""
    described = {"capability": (9, 0), "triton": (3, 6, 0), "ptxas": (13, 3), "installed": {"fla"}}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: described["capability"])
    monkeypatch.setattr(fla, "triton_version", lambda: described["triton"])
    monkeypatch.setattr(fla, "ptxas_version", lambda: described["ptxas"])
    monkeypatch.setattr(fla, "_installed", lambda package: package in described["installed"])
    linear_scan._warn_fallback.cache_clear()
    yield described
    linear_scan._warn_fallback.cache_clear()


def resolve(backend: str | None = None, dtype: torch.dtype = torch.bfloat16, key: int = 64, **options: bool) -> str:
    return linear_scan._resolve(backend, GPU, dtype, key, **{"trained": True, "delta": True} | options)


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"triton": (3, 3, 1)}, {}, None),
        ({"triton": (3, 4, 0)}, {}, r"Triton 3\.4\.0 .*wrong gradients on a Hopper GPU .*upgrade .* 3\.9.*tilelang"),
        ({"triton": (3, 7, 0)}, {}, r"Triton 3\.7\.0"),
        ({"triton": (3, 7, 1)}, {}, None),
        ({"triton": (3, 8, 0), "ptxas": (12, 9)}, {}, r"ptxas 12\.9, .*wrong .*3\.9 .*nvcc>=13\.3.*TRITON_PTXAS_PATH"),
        ({"triton": (3, 8, 0), "ptxas": (12, 9)}, {"trained": False}, None),
        ({"triton": (3, 8, 0), "ptxas": (12, 9), "capability": (8, 0)}, {}, None),
        ({"triton": (3, 3, 1), "ptxas": (12, 8)}, {}, None),
        ({"installed": {"fla", "tilelang"}, "ptxas": (12, 8)}, {}, r"ptxas 12\.8, .*nvcc>=13\.3"),
        ({"ptxas": (12, 8)}, {}, r"Triton 3\.6\.0 .*3\.9 or newer, or .* tilelang.*nvcc>=13\.3.*TRITON_PTXAS"),
        ({"triton": (3, 8, 0), "ptxas": (0, 0)}, {}, r"ptxas of unknown version, "),
        ({"capability": (8, 0)}, {}, None),
        ({"capability": (10, 0)}, {}, None),
        ({}, {"trained": False}, None),
        ({"installed": {"fla", "tilelang"}}, {}, None),
        ({"installed": {"fla", "tilelang"}}, {"delta": False}, r"Triton 3\.6\.0 .*3\.9 or newer$"),
        ({"installed": set(), "triton": (3, 7, 1)}, {}, r"not installed: pip install 'm2rnn\[fla\]'"),
        ({"triton": (3, 7, 1)}, {"dtype": torch.float32}, "bfloat16 or float16, not float32"),
        ({"triton": (3, 7, 1)}, {"key": 257}, "keys of up to 256 channels, not 257"),
        ({"triton": (3, 7, 1)}, {"key": 257, "delta": False}, None),
    ],
)  # fmt: skip
def test_kernels_run_where_they_are_right(machine: dict, change: dict, options: dict, reason: str | None) -> None:
    """And where they do not, an explicit choice is an error, an automatic one PyTorch with one warning."""
    machine.update(change)
    if reason is None:
        assert resolve(**options) == resolve("fla", **options) == "fla"
    else:
        with pytest.raises(ValueError, match=f"backend 'fla' cannot run: .*{reason}"):
            resolve("fla", **options)
        with pytest.warns(UserWarning, match=f"plain PyTorch on this GPU.*{reason}"):
            assert resolve(**options) == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resolve(**options) == "torch"
    assert resolve("torch", **options) == "torch"


def test_cpu_tensors_take_pytorch() -> None:
    case = CASES["delta"]
    inputs = case.tensors()
    assert all(torch.equal(x, y) for x, y in zip(case.scan(inputs, None), case.scan(inputs), strict=True))
    with pytest.raises(ValueError, match="backend 'fla' cannot run: its kernels need a GPU, the tensors are on cpu"):
        case.scan(inputs, "fla")
    with pytest.raises(ValueError, match="backend must be one of torch, fla or None, got 'cuda'"):
        case.scan(inputs, "cuda")


def test_versions_of_triton_and_its_assembler_are_read_or_none() -> None:
    assert fla.triton_version() == (0, 0, 0) if find_spec("triton") is None else fla.triton_version() > (3, 0, 0)
    assert fla._version_of_ptxas() == (0, 0) if find_spec("triton") is None else fla._version_of_ptxas() > (12, 0)


def test_the_assembler_asked_for_is_that_of_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    monkeypatch.setattr(
        compiler, "get_ptxas_version", lambda arch: f"Cuda compilation tools, release {arch}.4, V{arch}.4.59"
    )
    assert fla._version_of_ptxas() == (90, 4)


def test_kernels_get_what_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the definition stands in for each kernel, called as fla documents its function."""

    def delta(q, k, v, g, beta, *, scale, initial_state, output_final_state, cu_seqlens, num_householder=1):
        assert (scale, output_final_state) == (1.0, True)
        shape = (q.shape[1], num_householder)
        k, v, beta = (x.unflatten(1, shape) for x in (k, v, beta))
        return gated_delta_scan(q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens, backend="torch")

    def linear(q, k, v, g, *, scale, initial_state, output_final_state, cu_seqlens):
        assert (scale, output_final_state) == (1.0, True)
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert q.shape[3] % 2 == v.shape[3] % 2 == 0
        return gated_linear_scan(q, k, v, g, initial_state=initial_state, cu_seqlens=cu_seqlens, backend="torch")

    modules = {
        "gated_delta_rule": {"chunk_gated_delta_rule": delta},
        "gated_delta_product": {"chunk_gated_delta_product": delta},
        "simple_gla": {"chunk_simple_gla": linear},
    }
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", SimpleNamespace(**functions))
    monkeypatch.setattr(fla, "why_not", lambda *_, **__: None)
    for case in (Case((3, 0, 9), packed=True, writes=writes, heads=4, key=3) for writes in (0, 1, 2)):
        check(case, FLOAT64, "fla")
        check(replace(case, lengths=(9, 9), packed=False, state=False), FLOAT64, "fla")
