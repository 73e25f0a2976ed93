"""The bound on W: it cuts singular values and nothing else, wherever W lies, and then every bounded head forgets."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import m2rnn
from m2rnn.layers import M2RNN
from m2rnn.layers.state_weight import bound_, bound_state_weights, head_bounds
from m2rnn.models import M2RNNForCausalLM
from m2rnn.ops.scan import reference
from tests.convert.hybrids import make as make_hybrid
from tests.convert.hybrids import needs_swap
from tests.models.small import OPTIONS, config
from tests.tolerances import relative_error

BOUND = 0.9
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-6}
ROOT = Path(__file__).parents[2]


def layer_of(weight: Tensor, bound: float | None = BOUND, bounded_heads: int | None = None) -> M2RNN:
    """A layer with this W, which it did not start with."""
    heads, width, _ = weight.shape
    layer = M2RNN(8, heads, 2, width, state_weight_bound=bound, bounded_heads=bounded_heads)
    layer.state_weight = nn.Parameter(weight.clone())
    return layer


def random_weight(heads: int, width: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrices whose singular values reach about twice ``scale``."""
    generator = torch.Generator().manual_seed(heads + width)
    return (torch.randn(heads, width, width, generator=generator, dtype=torch.float64) * scale * width**-0.5).to(dtype)


def by_decomposition(weight: Tensor, bound: float) -> Tensor:
    left, values, right = np.linalg.svd(weight.double().numpy())
    return torch.from_numpy(left * np.minimum(values, bound)[:, None] @ right)


def largest(weight: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(weight.detach().double(), 2)


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("scale", [0.5, 1, 45])  # to 100 times the bound
@pytest.mark.parametrize("width", [4, 8, 16, 32])
def test_a_cut_W_is_its_decomposition_with_cut_singular_values(width: int, scale: float, dtype: torch.dtype) -> None:
    weight = random_weight(6, width, scale, dtype)
    weight[0], weight[1] = torch.eye(width), 0
    layer = layer_of(weight)
    assert bound_state_weights(layer) == 1
    for found, expected in zip(layer.state_weight, by_decomposition(weight, BOUND), strict=True):
        assert relative_error(found, expected) < ERRORS[dtype]
    assert largest(layer.state_weight).max() < BOUND * (1 + 1e-6)


def test_each_layer_has_its_own_bound_and_one_for_all_comes_before_them() -> None:
    weight = random_weight(3, 6, 2)
    other = random_weight(4, 5, 2, torch.float32)
    model = nn.ModuleList([layer_of(weight, 0.5), layer_of(weight, 1.2, 2), layer_of(weight, None), layer_of(other)])
    assert bound_state_weights(model) == 3
    narrow, partly, free, narrower = (layer.state_weight for layer in model)
    assert relative_error(narrow, by_decomposition(weight, 0.5)) < 1e-12
    assert relative_error(partly[:2], by_decomposition(weight[:2], 1.2)) < 1e-12
    assert torch.equal(partly[2], weight[2])
    assert torch.equal(free, weight)
    assert relative_error(narrower, by_decomposition(other, BOUND)) < 1e-6
    assert bound_state_weights(model, 0.3, 1) == 4
    for layer in model:
        assert largest(layer.state_weight)[0] < 0.3 * (1 + 1e-6)
    assert torch.equal(free[1:], weight[1:])


def test_matrices_within_the_bound_and_free_heads_keep_their_bits() -> None:
    weight = random_weight(4, 8, 2, torch.float32)
    weight[0] *= 0.8 / largest(weight)[0]
    layer = layer_of(weight, BOUND, 2)
    bound_state_weights(layer)
    assert torch.equal(layer.state_weight[0], weight[0])
    assert not torch.equal(layer.state_weight[1], weight[1])
    assert torch.equal(layer.state_weight[2:], weight[2:])


def test_even_a_free_head_without_finite_numbers_stays_and_disturbs_nobody() -> None:
    weight = random_weight(3, 8, 2)
    weight[2] = math.nan
    layer = layer_of(weight, BOUND, 2)
    bound_state_weights(layer)
    assert relative_error(layer.state_weight[:2], by_decomposition(weight[:2], BOUND)) < 1e-12
    assert layer.state_weight[2].isnan().all()


@pytest.mark.parametrize("dtype", ERRORS)
def test_a_second_cut_changes_nothing(dtype: torch.dtype) -> None:
    layer = layer_of(random_weight(5, 16, 3, dtype))
    bound_state_weights(layer)
    once = layer.state_weight.detach().clone()
    bound_state_weights(layer)
    assert relative_error(layer.state_weight, once) < 1e-6


def test_a_cut_is_no_part_of_a_gradient_and_leaves_optimizers_their_parameter() -> None:
    layer = layer_of(random_weight(2, 4, 2))
    parameter = layer.state_weight
    parameter.sum().backward()
    gradient = parameter.grad.clone()
    bound_state_weights(layer)
    assert layer.state_weight is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert torch.equal(parameter.grad, gradient)


def test_other_models_have_no_bound() -> None:
    assert bound_state_weights(nn.Linear(3, 3), 0.5) == 0
    assert m2rnn.bound_state_weights is bound_state_weights


@needs_swap
def test_swapped_layers_count() -> None:
    model = make_hybrid("qwen3_next")
    options = {"num_heads": 6, "key_dim": 8, "value_dim": 8}
    m2rnn.swap(model, [0, 3], **options, state_weight_bound=BOUND)
    m2rnn.swap(model, [1], **options)
    weights = [p for name, p in m2rnn.swapped_parameters(model).items() if name.endswith("state_weight")]
    for weight in weights:
        nn.init.normal_(weight)
    assert bound_state_weights(model) == 2
    assert sorted((largest(weight) < BOUND * (1 + 1e-6)).all().item() for weight in weights) == [False, True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_weight_bound": 0.0}, r"state_weight_bound 0\.0: expected a number above 0"),
        ({"state_weight_bound": -1.0}, r"state_weight_bound -1\.0"),
        ({"state_weight_bound": math.inf}, r"state_weight_bound inf.* or None"),
        ({"state_weight_bound": math.nan}, r"state_weight_bound nan"),
        ({"bounded_heads": 2}, r"bounded_heads 2: expected a state_weight_bound with it"),
        ({"state_weight_bound": 0.9, "bounded_heads": 5}, r"bounded_heads 5: expected 0 to .*, which is 4"),
        ({"state_weight_bound": 0.9, "bounded_heads": -1}, r"bounded_heads -1"),
        ({"state_weight_bound": 0.9, "bounded_heads": 3, "num_weight_heads": 2}, r"bounded_heads 3: .* which is 2"),
    ],
)
def test_wrong_bounds_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        M2RNN(8, num_heads=4, key_dim=2, value_dim=3, **options)


def test_a_wrong_bound_for_all_layers_is_named_and_changes_nothing() -> None:
    weight = random_weight(3, 4, 2)
    model = nn.ModuleList([layer_of(weight), layer_of(weight[:2])])
    with pytest.raises(ValueError, match="bounded_heads 3: expected 0 to the number of heads of W, which is 2"):
        bound_state_weights(model, 0.5, 3)
    with pytest.raises(ValueError, match=r"state_weight_bound 0: expected"):
        bound_state_weights(model, 0)
    assert torch.equal(model[0].state_weight, weight)


def test_no_bounded_heads_leaves_all_free() -> None:
    assert head_bounds(3, None, None) is None
    assert head_bounds(3, 0.5, 0).tolist() == [math.inf] * 3
    assert head_bounds(3, 0.5, 2).tolist() == [0.5, 0.5, math.inf]
    weight = random_weight(3, 4, 2)
    kept = weight.clone()
    bound_(weight, 0.5, 0)
    bound_(weight, None, None)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("init", ["identity", "normal"])
def test_a_layer_starts_within_its_bound(init: str) -> None:
    torch.manual_seed(0)
    bounded = M2RNN(8, 6, 2, 16, weight_init=init, state_weight_bound=BOUND, bounded_heads=4).state_weight
    torch.manual_seed(0)
    free = M2RNN(8, 6, 2, 16, weight_init=init).state_weight
    assert relative_error(bounded[:4], by_decomposition(free[:4].detach(), BOUND)) < 1e-6
    assert torch.equal(bounded[4:], free[4:])


def bounded_config(init: str = "normal"):
    options = OPTIONS["m2rnn"] | {"weight_init": init, "state_weight_bound": BOUND, "bounded_heads": 1}
    return config("m2rnn", mixer_options={"m2rnn": options})


@pytest.mark.parametrize("init", ["identity", "normal"])
def test_a_W_that_a_checkpoint_lacks_starts_within_its_bound(init: str, tmp_path: Path) -> None:
    M2RNNForCausalLM(bounded_config(init)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "state_weight" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    model = M2RNNForCausalLM.from_pretrained(tmp_path)  # by the meta device
    for block in model.model.layers:
        weight = block.mixer.state_weight
        assert not weight.isnan().any()
        assert largest(weight)[0] < BOUND * (1 + 1e-6)
        assert largest(weight)[1] > BOUND


def test_a_loaded_W_is_not_touched(tmp_path: Path) -> None:
    model = M2RNNForCausalLM(bounded_config())
    with torch.no_grad():
        for block in model.model.layers:
            block.mixer.state_weight.mul_(5)
    model.save_pretrained(tmp_path)
    loaded = M2RNNForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.mixer_options["m2rnn"]["state_weight_bound"] == BOUND
    for block, saved in zip(loaded.model.layers, model.model.layers, strict=True):
        assert torch.equal(block.mixer.state_weight, saved.mixer.state_weight)
    assert bound_state_weights(loaded) == 2


def test_heads_that_are_shared_out_unevenly_are_cut_as_the_whole() -> None:
    script = str(Path(__file__).with_name("bound_together.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 2


def states_of(weight: Tensor, starts: list[Tensor], tokens: int, f: Tensor, inputs: float) -> list[list[Tensor]]:
    """The states after each token, from each of some initial states, under the same inputs."""
    generator = torch.Generator().manual_seed(1)
    heads, width, _ = weight.shape
    k = torch.randn(1, tokens, heads, 5, generator=generator, dtype=torch.float64) * inputs
    v = torch.randn(1, tokens, heads, width, generator=generator, dtype=torch.float64)
    return [
        [reference.scan(k[:, :t], k[:, :t], v[:, :t], f[:, :t], weight, start)[1] for t in range(1, tokens + 1)]
        for start in starts
    ]


def test_two_states_under_the_same_inputs_merge() -> None:
    # tanh is 1-Lipschitz in each component, so ‖Z1 - Z2‖ ≤ ‖(H1 - H2) W‖ ≤ b ‖H1 - H2‖ in Frobenius norms, whatever
    # the inputs; the step f H + (1 - f) Z therefore takes the distance at most times f + (1 - f) b.
    weight, tokens = random_weight(3, 6, 2), 20
    bound_(weight, BOUND, None)
    f = torch.rand(1, tokens, 3, dtype=torch.float64)
    starts = [torch.randn(1, 3, 5, 6, dtype=torch.float64) * size for size in (0.01, 3)]
    limit = torch.linalg.matrix_norm(starts[0] - starts[1])
    for first, second, gate in zip(*states_of(weight, starts, tokens, f, 1.0), f[0], strict=True):
        limit = limit * (gate + (1 - gate) * BOUND)
        assert (torch.linalg.matrix_norm(first - second) <= limit * (1 + 1e-12)).all()
    assert limit.max() < 0.5 * torch.linalg.matrix_norm(starts[0] - starts[1]).min()


def test_two_states_part_along_a_singular_direction_above_one() -> None:
    weight, tokens = 1.5 * torch.eye(6, dtype=torch.float64).expand(3, 6, 6), 100
    f = torch.full((1, tokens, 3), 0.5, dtype=torch.float64)
    start = torch.full((1, 3, 5, 6), 0.01, dtype=torch.float64)
    states = states_of(weight, [start, -start], tokens, f, 0.0)
    apart = [torch.linalg.matrix_norm(first - second) for first, second in zip(*states, strict=True)]
    assert (apart[0] > torch.linalg.matrix_norm(2 * start)).all()
    # each stays at its side of zero, at the h of h = tanh(1.5 h), which is 0.8586
    assert relative_error(states[0][-1], torch.full_like(start, 0.858553)) < 1e-5
    assert (apart[-1] > 80 * torch.linalg.matrix_norm(2 * start)).all()
