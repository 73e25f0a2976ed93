"""The public operator: what it computes, validation, registration with PyTorch, autograd.

``m2rnn::scan`` and ``m2rnn::scan_backward`` are the registered operators; every backend stands behind these two.
"""

from typing import Any

import torch
from torch import Tensor, library

from m2rnn.ops.backends.checks import DTYPES, refuse_forward_mode, validate_clip, validate_offsets, validate_packing
from m2rnn.ops.backends.choice import why_unavailable
from m2rnn.ops.backends.dtypes import state_dtype
from m2rnn.ops.scan.problem import BACKENDS, Problem


def m2rnn_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    check_offsets: bool = True,
    state_clip: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The M2RNN recurrence over a batch of sequences.

    For each sequence and head, with a state H of K rows and V columns::

        Z_t = tanh(H_{t-1} W + k_t v_tᵀ)
        H_t = f_t H_{t-1} + (1 - f_t) Z_t
        y_t = H_tᵀ q_t

    q, k, v, f and W may each have fewer heads than H, the largest of their head counts, if their count divides H:
    head n reads source head ``n // (H / count)``. Shared heads are read in place, never expanded.

    Args:
        q: Queries ``[B, T, Hq, K]``, float64, float32, bfloat16 or float16, any strides; so are k, v and f.
        k: Keys ``[B, T, Hk, K]``.
        v: Values ``[B, T, Hv, V]``.
        f: Forget gates ``[B, T, Hf]`` in [0, 1]; 1 keeps the state. Not checked.
        weight: State-transition matrices W ``[Hw, V, V]``.
        initial_state: H_0 ``[B, H, K, V]``, or ``[N, H, K, V]`` for N packed sequences; zeros if None.
        output_final_state: Whether to return H_T of every sequence.
        cu_seqlens: Offsets ``[N + 1]`` (int32 or int64) of N sequences packed one after the other along T, from 0 to T;
            B is 1. Empty sequences are allowed.
        check_offsets: Check the values of ``cu_seqlens``, for which the host waits for the device. False is for offsets
            that are known to be right: with wrong ones memory is read and written that is not the tensors'. While a
            CUDA graph is captured they are not checked.
        state_clip: Clamp, in the backward pass, the gradient that reaches H_t from later steps (and from the final
            state) to [-state_clip, state_clip] elementwise. The gradient that y_t sends is exact.
        backend: ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"reference"``; None chooses by device, dtype and shape. See
            ``available_backends``.

    Returns:
        ``(y, final_state)``: y ``[B, T, H, V]`` in the dtype that q, k and v promote to; final_state
        ``[B or N, H, K, V]``, or None. The state is float64 if q, k, v, f or W is, else float32; an initial state of
        another dtype is cast. All are differentiable once.

    Under autocast q, k and v are cast to its dtype, unless one of them is float64; f, W and the state are not, since a
    forget gate near 1 rounds to 1.

    Raises:
        ValueError: A shape, dtype, device or value does not fit, or the backend cannot run here.

    Source: M²RNN (arXiv 2603.14360), section 3.
    """
    _validate(q, k, v, f, weight, initial_state, cu_seqlens, state_clip, backend)
    y, final_state = _apply(q, k, v, f, weight, initial_state, cu_seqlens, check_offsets, state_clip, backend)
    return y, final_state if output_final_state else None


def m2rnn_step(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, weight: Tensor, state: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, for decoding: ``m2rnn_scan`` for a single token, without the time dimension.

    Args:
        q: Queries ``[B, Hq, K]``; k: keys ``[B, Hk, K]``; v: values ``[B, Hv, V]``; f: forget gates ``[B, Hf]``.
        k: See q.
        v: See q.
        f: See q.
        weight: State-transition matrices ``[Hw, V, V]``.
        state: The state before the token ``[B, H, K, V]``; it is not modified.
        backend: As in ``m2rnn_scan``.

    Returns:
        ``(y, state)``: y ``[B, H, V]`` and the state after the token ``[B, H, K, V]``.

    Raises:
        ValueError: As ``m2rnn_scan``.
    """
    _validate(q, k, v, f, weight, state, None, None, backend, state_name="state")
    inputs = (q[:, None], k[:, None], v[:, None], f[:, None], weight)
    y, state = _apply(*inputs, state, None, False, None, backend)
    return y[:, 0], state


def _apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    check_offsets: bool,
    state_clip: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and state_dtype(q, k, v) != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    inputs = (q, k, v, f, weight, initial_state)
    refuse_forward_mode("m2rnn_scan", inputs)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    # How many states depends on T, which an export leaves open. The flag and not is_exporting(), which torch 2.11's
    # compiler takes for true in every trace: compiled training would run the forward pass twice.
    save = save and not torch.compiler._is_exporting_flag
    clip = None if state_clip is None else float(state_clip)
    y, final_state, _ = torch.ops.m2rnn.scan(*inputs, cu_seqlens, check_offsets, clip, backend, save)
    return y, final_state


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run here or else the reason why it cannot."""
    return {name: why_unavailable(name) for name in BACKENDS.modules}


# ---------------------------------------------------------------------------------------------------- validation


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    state_clip: float | None,
    backend: str | None,
    state_name: str = "initial_state",
) -> None:
    """What shapes, dtypes and devices can tell. For ``m2rnn_step`` the tensors come without T."""
    BACKENDS.check_name(backend)
    step = state_name == "state"
    lead = "B" if step else "B, T"
    layouts = {
        "q": (q, f"[{lead}, heads, K]"),
        "k": (k, f"[{lead}, heads, K]"),
        "v": (v, f"[{lead}, heads, V]"),
        "f": (f, f"[{lead}, heads]"),
        "weight": (weight, "[heads, V, V]"),
        state_name: (initial_state, "[B or sequences, heads, K, V]"),
    }
    if initial_state is None and not step:
        del layouts[state_name]
    shapes = {}
    for name, (x, layout) in layouts.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}, expected a tensor {layout}")
        shapes[name] = list(x.shape)
        if x.dim() != layout.count(",") + 1:
            raise ValueError(f"{name} has shape {shapes[name]}, expected {layout}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}, expected float64, float32, bfloat16 or float16")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected {q.device} like q")

    leading = shapes["q"][: 1 if step else 2]
    for name in ("k", "v", "f"):
        if shapes[name][: len(leading)] != leading:
            expected = f"[{', '.join(map(str, leading))}, ...], since q has shape {shapes['q']}"
            raise ValueError(f"{name} has shape {shapes[name]}, expected {expected}")
    key_dim, value_dim = shapes["q"][-1], shapes["v"][-1]
    for name in ("q", "v"):
        if shapes[name][-1] < 1:
            raise ValueError(f"{name} has shape {shapes[name]}, expected at least one channel")
    if shapes["k"][-1] != key_dim:
        raise ValueError(f"k has shape {shapes['k']}, expected K = {key_dim} channels as in q, {shapes['q']}")
    if shapes["weight"][1:] != [value_dim, value_dim]:
        expected = f"[heads, {value_dim}, {value_dim}], since v has shape {shapes['v']}"
        raise ValueError(f"weight has shape {shapes['weight']}, expected {expected}")
    counts = {
        "q": q.shape[-2],
        "k": k.shape[-2],
        "v": v.shape[-2],
        "f": f.shape[-1],
        "weight": weight.shape[0],
    }
    heads = max(counts.values())
    for name, count in counts.items():
        if count < 1 or heads % count:
            expected = f"a head count that divides {heads}, the largest"
            raise ValueError(f"{name} has shape {shapes[name]} with {count} heads, expected {expected}")

    sequences = validate_packing(cu_seqlens, q, "q")
    if initial_state is not None:
        expected_state = [sequences, heads, key_dim, value_dim]
        if shapes[state_name] != expected_state:
            raise ValueError(f"{state_name} has shape {shapes[state_name]}, expected {expected_state}")
    validate_clip(state_clip)


# ---------------------------------------------------------------------------------------- operators and autograd


# library.custom_op would say the same in fewer lines, but imports torch's compiler at the first call: a second
_LIBRARY = library.Library("m2rnn", "DEF")
_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor f, Tensor weight, Tensor? initial_state"
_LIBRARY.define(
    f"scan({_ARGUMENTS}, Tensor? cu_seqlens, bool check_offsets, float? state_clip, str? backend, bool save)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    f"scan_backward(Tensor? dy, Tensor? d_final, {_ARGUMENTS}, Tensor saved, Tensor? cu_seqlens, float? state_clip,"
    " str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@library.impl(_LIBRARY, "scan", "CompositeExplicitAutograd")
def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    check_offsets: bool,
    state_clip: float | None,
    backend: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, final state, states saved for the backward pass if save)``."""
    if check_offsets:
        validate_offsets(cu_seqlens, q.shape[1])
    problem = Problem(q, k, v, f, weight, initial_state, cu_seqlens, state_clip)
    y, final, saved = BACKENDS.module(BACKENDS.choose(backend, problem)).forward(problem, save)
    return y, final, final.new_empty(0) if saved is None else saved


@library.register_fake("m2rnn::scan", lib=_LIBRARY)
def _scan_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    check_offsets: bool,
    state_clip: float | None,
    backend: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(q, k, v, f, weight, initial_state, cu_seqlens, state_clip)
    module, final = BACKENDS.module(BACKENDS.choose(backend, problem)), problem.new_states(problem.sequences)
    return problem.new_y(), final, module.saved_like(problem) if save else final.new_empty(0)


@library.impl(_LIBRARY, "scan_backward", "CompositeExplicitAutograd")
def _scan_backward(
    dy: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    state_clip: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, f, the weight and the initial state (empty if there is none)."""
    problem = Problem(q, k, v, f, weight, initial_state, cu_seqlens, state_clip)
    if dy is None:
        dy = problem.new_y().zero_()
    module = BACKENDS.module(BACKENDS.choose(backend, problem))
    *gradients, d_initial = module.backward(problem, saved, dy, d_final)
    return *gradients, q.new_empty(0) if d_initial is None else d_initial


@library.register_fake("m2rnn::scan_backward", lib=_LIBRARY)
def _scan_backward_fake(
    dy: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    f: Tensor,
    weight: Tensor,
    initial_state: Tensor | None,
    saved: Tensor,
    cu_seqlens: Tensor | None,
    state_clip: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v, f, weight))
    return *gradients, q.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.state_clip, ctx.backend, ctx.has_saved = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, dy: Tensor | None, d_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, f, weight, initial_state, cu_seqlens, saved = ctx.saved_tensors
    if dy is None and d_final is None:
        return (None,) * 11
    if not ctx.has_saved:  # an exported program, which was traced without, is differentiated
        *_, saved = torch.ops.m2rnn.scan(
            q, k, v, f, weight, initial_state, cu_seqlens, False, ctx.state_clip, ctx.backend, True
        )
    *gradients, d_initial = torch.ops.m2rnn.scan_backward(
        dy, d_final, q, k, v, f, weight, initial_state, saved, cu_seqlens, ctx.state_clip, ctx.backend
    )
    return *gradients, None if initial_state is None else d_initial, None, None, None, None, None


library.register_autograd("m2rnn::scan", _autograd, setup_context=_setup_context, lib=_LIBRARY)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError("m2rnn_scan can be differentiated once: its gradient has no derivative (create_graph=True)")


library.register_autograd("m2rnn::scan_backward", _no_second_derivative, lib=_LIBRARY)
