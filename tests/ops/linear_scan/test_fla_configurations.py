"""fla's kernels in each of the launch configurations that its search may choose: chance decides which a user gets."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from m2rnn.ops.linear_scan import fla
from m2rnn.ops.linear_scan.operator import gated_delta_scan
from tests.ops.linear_scan.test_linear_scan import WIDE, Case, needs_fla
from tests.tolerances import TOLERANCES, relative_error

REPEATS = 4  # what a race makes wrong does not always show
LENGTHS = (1024, 700, 1024, 300)
CASES = WIDE | {
    "delta, 410M": Case(LENGTHS, packed=True, key=256, value=512, state=False, decay=0.05),
    "delta, tiny": Case((70, 0, 3, 200), packed=True, key=16, value=32),
    "delta, 128": Case(LENGTHS, packed=True, heads=4, key=128, value=128, decay=0.05),
    "linear, Mamba-2": Case(LENGTHS, packed=True, writes=0, heads=32, key=216, value=19, state=False, decay=0.05),
}


class Search:
    """In the place of Triton's: of each kernel the first configuration, unless another is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.autotuner import Autotuner

        self.kernels: dict[str, tuple[Autotuner, list]] = {}
        run = Autotuner.run

        def run_one(tuner: Autotuner, *args: object, **options: object) -> object:
            name = f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}"
            if name not in self.kernels:
                self.kernels[name] = tuner, tuner.configs
                monkeypatch.setattr(tuner, "configs", tuner.configs[:1])
            return run(tuner, *args, **options)

        monkeypatch.setattr(Autotuner, "run", run_one)


@needs_fla
@pytest.mark.parametrize("name", CASES)
def test_every_configuration_is_right(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not request.config.getoption("--exhaustive"):
        pytest.skip("minutes long: needs --exhaustive")
    case = CASES[name]
    reason = fla.why_not(torch.device("cuda"), torch.bfloat16, case.key, trained=True, delta=case.writes > 0)
    if reason is not None:
        pytest.skip(reason)
    from triton.runtime.errors import OutOfResources

    inputs = {key: x.detach().cuda().requires_grad_() for key, x in case.tensors(torch.bfloat16).items()}
    exact = {key: x.detach().double().requires_grad_() for key, x in inputs.items()}
    cotangents = [torch.randn_like(x) for x in case.scan(exact, "torch", "cuda")]

    def derivatives(inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        results = case.scan(inputs, backend, "cuda")
        gradients = torch.autograd.grad(
            results, list(inputs.values()), [c.to(x.dtype) for c, x in zip(cotangents, results, strict=True)]
        )
        return dict(zip(("y", "state", *inputs), [x.detach() for x in results] + list(gradients), strict=True))

    expected = derivatives(exact, "torch")

    def faults() -> list[str]:
        """What differs from float64, or from run to run."""
        first, *others = runs = [derivatives(inputs, "fla") for _ in range(REPEATS)]
        found = []
        for key, reference in expected.items():
            errors = [relative_error(run[key], reference) for run in runs]
            limit = 2 * TOLERANCES[torch.bfloat16]["gradient" if key in inputs else "output"]
            if not all(error <= limit for error in errors):
                found.append(f"{key} {errors}")
            elif not all(torch.equal(first[key], other[key]) for other in others):
                found.append(f"{key} differs")
        return found

    search = Search(monkeypatch)
    wrong = [f"the first of each: {fault}" for fault in faults()]
    for kernel, (tuner, configurations) in search.kernels.items():
        first = tuner.configs
        for configuration in configurations[1:]:
            tuner.configs = [configuration]
            try:
                wrong += [f"{kernel}, {configuration}: {fault}" for fault in faults()]
            except OutOfResources:
                continue  # the search passes over it, too
        tuner.configs = first
    assert not wrong, "\n".join(wrong)


def test_the_search_on_hopper_has_no_wrong_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what it has found before, as for another library's layers; other GPUs keep all."""
    two, four = (SimpleNamespace(num_warps=warps) for warps in (2, 4))
    tuner = SimpleNamespace(configs=[two, four], cache={"a": four, "b": two})
    kernel = SimpleNamespace(fn=tuner)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    wy_fast = SimpleNamespace(prepare_wy_repr_bwd_kernel=kernel)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule.wy_fast", wy_fast)
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert not fla.drop_wrong_configurations(gpu)
    assert not fla.drop_wrong_configurations(torch.device("cpu"))
    assert tuner.configs == [two, four]
    capability = (9, 0)
    for _ in range(2):
        assert fla.drop_wrong_configurations(gpu)
        assert tuner.configs == [two]
        assert tuner.cache == {"b": two}


@pytest.mark.parametrize("writes", [1, 2])
def test_the_delta_rule_drops_them_first(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: Tensor, **__: object) -> tuple[Tensor, Tensor]:
        events.append("run")
        return v[:, :: k.shape[1] // q.shape[1]], torch.zeros(1)

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for name in ("gated_delta_rule", "gated_delta_product"):
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", SimpleNamespace(**{f"chunk_{name}": kernel}))
    monkeypatch.setattr(fla, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(fla, "drop_wrong_configurations", lambda device: events.append("drop"))
    case = Case((4,), writes=writes)
    case.scan(case.tensors(), "fla")
    assert events == ["drop", "run"]


def test_a_compiled_model_reaches_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla's functions break the graph; what is done before them must not end the compilation."""
    calls = []

    @torch.compiler.disable
    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: Tensor, **__: object) -> tuple[Tensor, Tensor]:
        calls.append(q.shape)
        return 2 * v, v.new_zeros(1)

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", SimpleNamespace(chunk_gated_delta_rule=kernel))
    monkeypatch.setattr(fla, "why_not", lambda *_, **__: None)
    torch.compiler.reset()
    case = Case((4,))
    inputs = {name: x.detach() for name, x in case.tensors().items()}
    scan = torch.compile(lambda **x: gated_delta_scan(**x, backend="fla")[0] + 1, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(scan(**inputs), 2 * inputs["v"][:, :, 0] + 1)
    assert len(calls) == 2
