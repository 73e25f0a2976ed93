"""How often a training step calls each operator of ours: once forward and once backward a layer, eager and compiled."""

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from m2rnn.layers import GRU, M2RNN, RNN, Packing

T, WIDTH = 12, 32
MIXERS = {
    "m2rnn": (lambda: M2RNN(WIDTH, 4, 8, 8), "scan"),
    "gru": (lambda: GRU(WIDTH, 2, 16), "vector_scan"),
    "rnn": (lambda: RNN(WIDTH, 2, 16), "vector_scan"),
}


class Calls(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "m2rnn":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count_graphs(counts: Counter[str]):
    """A backend of torch.compile that counts the calls in the forward and backward graphs that it is given."""

    def compiler(graph: torch.fx.GraphModule, _inputs):
        for node in graph.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "m2rnn":
                counts[node.target._opname] += 1
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def step(module: nn.Module, packed: bool) -> None:
    x = torch.randn(1, T, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    packing = Packing.from_cu_seqlens(torch.tensor([0, 5, T], dtype=torch.int32), T) if packed else None
    module(x, None, packing, output_state=False)[0].square().sum().backward()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_a_training_step_calls_the_recurrence_once_forward_and_once_backward(name: str, packed: bool) -> None:
    make, operator = MIXERS[name]
    eager, compiled = Calls(), Counter()
    with eager:
        step(make(), packed)
    torch.compiler.reset()
    step(torch.compile(make(), backend=count_graphs(compiled), fullgraph=True), packed)
    expected = {operator: 1, f"{operator}_backward": 1}
    assert dict(eager.counts) == expected, "eager"
    assert dict(compiled) == expected, "compiled"
