"""The vector recurrences of the paper's baselines, RNN and GRU: public functions, validation, registration, autograd.

Both are one operator, ``m2rnn::vector_scan``, with one input and weight or three. Its output is the state after every
step, so the backward pass reads that and nothing else is saved.
"""

from typing import Any

import torch
from torch import Tensor, library

from m2rnn.ops.backends.checks import DTYPES, refuse_forward_mode, validate_clip, validate_offsets, validate_packing
from m2rnn.ops.backends.dtypes import state_dtype
from m2rnn.ops.vector_scan.problem import BACKENDS, Problem


def rnn_scan(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_offsets: bool = True,
    state_clip: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Recurrent networks of V units, one for each head, over a batch of sequences.

    For each sequence and head ``h_t = tanh(h_{t-1} W + x_t)``; the output y_t is h_t.

    Args:
        x: Inputs ``[B, T, H, V]``, float64, float32, bfloat16 or float16, any strides.
        weight: State-transition matrices W ``[H, V, V]``.
        initial_state: h_0 ``[B, H, V]``, or ``[N, H, V]`` for N packed sequences; zeros if None.
        output_final_state: Whether to return h_T of every sequence.
        cu_seqlens: Offsets ``[N + 1]`` of packed sequences, as in ``m2rnn_scan``.
        check_offsets: As there.
        state_clip: Clamp, in the backward pass, the gradient that reaches h_t from later steps (and from the final
            state) to [-state_clip, state_clip] elementwise. The gradient that y_t sends is exact.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None chooses by device, dtype and shape.

    Returns:
        ``(y, final_state)``: y ``[B, T, H, V]`` in the dtype of x; final_state ``[B or N, H, V]``, or None. The
        state is float64 if x or W is, else float32; an initial state of another dtype is cast. The backward pass takes
        it from y, rounded to y's dtype; that rounding does not add up over steps. All are differentiable once.

    Under autocast x is cast to its dtype, unless it is float64; W and the state are not.

    Raises:
        ValueError: A shape, dtype, device or value does not fit, or the backend cannot run here.

    Source: the RNN baseline of M²RNN (arXiv 2603.14360).
    """
    y, final_state = _checked(
        {"x": x}, {"weight": weight}, initial_state, cu_seqlens, check_offsets, state_clip, backend
    )  # fmt: skip
    return y, final_state if output_final_state else None


def gru_scan(
    x: Tensor,
    x_forget: Tensor,
    x_reset: Tensor,
    weight: Tensor,
    weight_forget: Tensor,
    weight_reset: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_offsets: bool = True,
    state_clip: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated recurrent units, V of them for each head, over a batch of sequences.

    For each sequence and head, with the logistic function σ::

        f_t = σ(h_{t-1} W_f + x_t^f)        r_t = σ(h_{t-1} W_r + x_t^r)
        z_t = tanh((r_t ⊙ h_{t-1}) W + x_t)
        h_t = f_t ⊙ h_{t-1} + (1 - f_t) ⊙ z_t

    and the output y_t is h_t.

    Args:
        x: Inputs of the update ``[B, T, H, V]``; ``x_forget`` and ``x_reset``, those of the gates, have its shape.
        x_forget: See x.
        x_reset: See x.
        weight: W ``[H, V, V]``; so are ``weight_forget``, W_f, and ``weight_reset``, W_r.
        weight_forget: See weight.
        weight_reset: See weight.
        initial_state: As in ``rnn_scan``, like all other arguments and what is returned and raised.
        output_final_state: See initial_state.
        cu_seqlens: See initial_state.
        check_offsets: See initial_state.
        state_clip: See initial_state.
        backend: See initial_state.

    Returns:
        ``(y, final_state)``, as in ``rnn_scan``; y has the dtype that the three inputs promote to.

    Source: the GRU baseline of M²RNN (arXiv 2603.14360).
    """
    y, final_state = _checked(
        {"x": x, "x_forget": x_forget, "x_reset": x_reset},
        {"weight": weight, "weight_forget": weight_forget, "weight_reset": weight_reset},
        initial_state, cu_seqlens, check_offsets, state_clip, backend,
    )  # fmt: skip
    return y, final_state if output_final_state else None


def _checked(
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    check_offsets: bool,
    state_clip: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _validate(inputs, weights, initial_state, cu_seqlens, state_clip, backend)
    xs, ws = list(inputs.values()), list(weights.values())
    device = xs[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device) and state_dtype(*xs) != torch.float64:
        xs = [x.to(torch.get_autocast_dtype(device)) for x in xs]
    refuse_forward_mode("rnn_scan or gru_scan", (*xs, *ws, initial_state))
    clip = None if state_clip is None else float(state_clip)
    y, final_state = torch.ops.m2rnn.vector_scan(xs, ws, initial_state, cu_seqlens, check_offsets, clip, backend)
    return y, final_state


def _validate(
    inputs: dict[str, Tensor],
    weights: dict[str, Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_clip: float | None,
    backend: str | None,
) -> None:
    """What shapes, dtypes and devices can tell."""
    BACKENDS.check_name(backend)
    x = inputs["x"]
    layouts = dict.fromkeys(inputs, "[B, T, heads, V]") | dict.fromkeys(weights, "[heads, V, V]")
    tensors = inputs | weights
    if initial_state is not None:
        layouts["initial_state"], tensors["initial_state"] = "[B or sequences, heads, V]", initial_state
    for name, layout in layouts.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, expected a tensor {layout}")
        shape = list(tensor.shape)
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{name} has shape {shape}, expected {layout}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected float64, float32, bfloat16 or float16")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {x.device} like x")
    heads, units = x.shape[2:]
    if min(heads, units) < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected at least one head and one unit")
    sequences = validate_packing(cu_seqlens, x, "x")
    for names, expected in (
        (inputs, list(x.shape)),
        (weights, [heads, units, units]),
        (("initial_state",) if initial_state is not None else (), [sequences, heads, units]),
    ):
        for name in names:
            if list(tensors[name].shape) != expected:
                shape = list(tensors[name].shape)
                raise ValueError(f"{name} has shape {shape}, expected {expected}, since x has shape {list(x.shape)}")
    validate_clip(state_clip)


# ---------------------------------------------------------------------------------------- operators and autograd


_LIBRARY = library.Library("m2rnn", "FRAGMENT")
_LIBRARY.define(
    "vector_scan(Tensor[] inputs, Tensor[] weights, Tensor? initial_state, Tensor? cu_seqlens, bool check_offsets,"
    " float? state_clip, str? backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "vector_scan_backward(Tensor? dy, Tensor? d_final, Tensor[] inputs, Tensor[] weights, Tensor? initial_state,"
    " Tensor y, Tensor? cu_seqlens, float? state_clip, str? backend) -> (Tensor[], Tensor[], Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@library.impl(_LIBRARY, "vector_scan", "CompositeExplicitAutograd")
def _scan(
    inputs: list[Tensor],
    weights: list[Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    check_offsets: bool,
    state_clip: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """``(y, final state)``."""
    if check_offsets:
        validate_offsets(cu_seqlens, inputs[0].shape[1])
    problem = Problem(inputs, weights, initial_state, cu_seqlens, state_clip)
    return BACKENDS.module(BACKENDS.choose(backend, problem)).forward(problem)  # type: ignore[no-any-return]


@library.register_fake("m2rnn::vector_scan", lib=_LIBRARY)
def _scan_fake(
    inputs: list[Tensor],
    weights: list[Tensor],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    check_offsets: bool,
    state_clip: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    problem = Problem(inputs, weights, initial_state, cu_seqlens, state_clip)
    return problem.new_y(), problem.new_state()


@library.impl(_LIBRARY, "vector_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(
    dy: Tensor | None,
    d_final: Tensor | None,
    inputs: list[Tensor],
    weights: list[Tensor],
    initial_state: Tensor | None,
    y: Tensor,
    cu_seqlens: Tensor | None,
    state_clip: float | None,
    backend: str | None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of the inputs, the weights and the initial state (empty if there is none)."""
    if dy is None:
        dy = torch.zeros_like(y)
    problem = Problem(inputs, weights, initial_state, cu_seqlens, state_clip)
    module = BACKENDS.module(BACKENDS.choose(backend, problem))
    d_inputs, d_weights, d_initial = module.backward(problem, y, dy, d_final)
    return d_inputs, d_weights, y.new_empty(0) if d_initial is None else d_initial


@library.register_fake("m2rnn::vector_scan_backward", lib=_LIBRARY)
def _scan_backward_fake(
    dy: Tensor | None,
    d_final: Tensor | None,
    inputs: list[Tensor],
    weights: list[Tensor],
    initial_state: Tensor | None,
    y: Tensor,
    cu_seqlens: Tensor | None,
    state_clip: float | None,
    backend: str | None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    d_inputs, d_weights = ([x.new_empty(x.shape) for x in tensors] for tensors in (inputs, weights))
    d_initial = y.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return d_inputs, d_weights, d_initial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    xs, weights, initial_state, cu_seqlens, _, ctx.state_clip, ctx.backend = inputs
    ctx.save_for_backward(*xs, *weights, initial_state, cu_seqlens, output[0])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
    *tensors, initial_state, cu_seqlens, y = ctx.saved_tensors
    half = len(tensors) // 2
    if dy is None and d_final is None:
        return [None] * half, [None] * half, None, None, None, None, None
    d_inputs, d_weights, d_initial = torch.ops.m2rnn.vector_scan_backward(
        dy, d_final, tensors[:half], tensors[half:], initial_state, y, cu_seqlens, ctx.state_clip, ctx.backend
    )
    return d_inputs, d_weights, None if initial_state is None else d_initial, None, None, None, None


library.register_autograd("m2rnn::vector_scan", _autograd, setup_context=_setup_context, lib=_LIBRARY)


def _no_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError("rnn_scan and gru_scan can be differentiated once: their gradient has none (create_graph=True)")


library.register_autograd("m2rnn::vector_scan_backward", _no_second_derivative, lib=_LIBRARY)
