"""The public operator: what it computes, validation, backend choice, registration with PyTorch, autograd.

``m2rnn::scan`` and ``m2rnn::scan_backward`` are the registered operators; every backend stands behind these two.
"""

import importlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd import forward_ad

from m2rnn.ops.backends.shapes import (
    CUDA_CHUNK,
    TRITON_CHUNK,
    chunk_length,
    cuda_parts,
    cuda_width,
    head_count,
    output_dtype,
    saved_states,
    state_dtype,
)
from m2rnn.ops.scan import cuda, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IMPORTED_IN = os.getpid()  #: the process that imported this; another one was forked from it
_BACKENDS = ("reference", "cpu", "triton", "cuda")
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "meta": ("reference",)}  # by device, the fastest first
_TRITON_FIRST = _PREFERRED | {"cuda": ("triton", "cuda")}


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


def refuse_forward_mode(operator: str, inputs: Iterable[Tensor | None]) -> None:
    """Raise if an input carries a tangent, as under ``torch.func.jvp``: the operators would drop it, and return 0."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"{operator} has no forward-mode derivative (torch.func.jvp and jacfwd): take torch.autograd.grad"
        )


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run here or else the reason why it cannot."""
    return {name: why_unavailable(name) for name in _BACKENDS}


@lru_cache
def why_unavailable(backend: str) -> str | None:
    match backend:
        case "cpu":
            return None if importlib.util.find_spec("numba") else "numba is not installed: pip install numba"
        case "triton":
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed: pip install triton"
            return None if triton_is_interpreted() or torch.cuda.is_available() else "no GPU that PyTorch can use"
        case "cuda":
            return cuda.why_unavailable()
    return None


def triton_is_interpreted() -> bool:
    """Triton's own switch, which it reads when it is imported: kernels run in Python, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(backend: str, q: Tensor, k: Tensor, v: Tensor, f: Tensor, weight: Tensor) -> str | None:
    """Why a backend cannot run on tensors of these devices, dtypes and channels, or None if it can."""
    if (reason := why_unavailable(backend)) is not None or backend == "reference" or q.is_meta:
        return reason
    match backend, q.device.type:
        case ("cpu", "cpu"):
            return None
        case ("triton", "cuda"):
            widest, why = _triton_limit(q.device, state_dtype(q, k, v, f, weight))
            return f"V is {v.shape[-1]}, {why}" if v.shape[-1] > widest else None
        case ("triton", "cpu") if triton_is_interpreted():
            return None
        case ("cuda", "cuda"):
            return cuda.why_not(q, k, v, f, weight)
    return f"the tensors are on {q.device.type}"


@lru_cache
def _triton_limit(device: torch.device, dtype: torch.dtype) -> tuple[int, str]:
    """The largest V that the Triton kernels take on a GPU, whose chip has to hold W and its gradient, and why."""
    gpu = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and gpu.major < 8:
        return 0, f"and {gpu.name} has compute capability {gpu.major}.{gpu.minor}: Triton needs 8.0"
    roomy = dtype == torch.float32 and getattr(gpu, "shared_memory_per_block_optin", 0) >= 160 << 10
    widest = 128 if roomy else 64
    return widest, f"and the Triton kernels take up to {widest} on {gpu.name} with a {str(dtype)[6:]} state"


@lru_cache
def _warn_fallback(operator: str, backend: str, device: str, reason: str) -> None:
    """Warns once for each reason: the cache remembers."""
    what = "the slow reference loop" if backend == "reference" else f"its {backend} kernels, not the fastest,"
    warnings.warn(f"{operator} runs {what} on {device} tensors: {reason}", stacklevel=5)


def choose_backend(
    operator: str,
    backend: str | None,
    device: str,
    preferred: Mapping[str, tuple[str, ...]],
    why_not: Callable[[str], str | None],
) -> str:
    """``backend`` if it can run, else an error; for None the first that can of those ``preferred`` on the device."""
    if backend is not None:
        if (reason := why_not(backend)) is not None:
            raise ValueError(f"backend={backend!r} cannot run: {reason}")
        return backend
    reasons = []
    for name in preferred.get(device, ()):
        if (reason := why_not(name)) is None:
            break
        reasons.append(reason)
    else:
        name = "reference"
        reasons = list(dict.fromkeys(reasons)) or [f"there is no kernel for {device}"]
    if reasons:
        _warn_fallback(operator, name, device, "; ".join(reasons))
    return name


def _resolve(backend: str | None, q: Tensor, k: Tensor, v: Tensor, f: Tensor, weight: Tensor) -> str:
    """The backend for these tensors; raises if the one asked for cannot run on them."""
    # W and the state of a wide head leave the CUDA kernels too few registers, and one token too little to do
    preferred = _PREFERRED
    if q.device.type == "cuda" and output_dtype(q, k, v).itemsize == 2 and (v.shape[-1] > 32 or q.shape[1] == 1):
        preferred = _TRITON_FIRST
    return choose_backend(
        "m2rnn_scan", backend, q.device.type, preferred, lambda name: _why_not(name, q, k, v, f, weight)
    )  # fmt: skip


def _kernels(backend: str) -> ModuleType:
    """The module of a backend other than the reference: imported when it runs, since compilers take a while."""
    return importlib.import_module(f"m2rnn.ops.scan.{backend}")


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
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, _BACKENDS))} or None")
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


def validate_packing(cu_seqlens: Tensor | None, x: Tensor, name: str) -> int:
    """The number of sequences in an input [B, T, ...] of this name; raises if ``cu_seqlens`` cannot pack them."""
    if cu_seqlens is None:
        return x.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is a {type(cu_seqlens).__name__}, expected a tensor [sequences + 1]")
    shape = list(cu_seqlens.shape)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"cu_seqlens has shape {shape}, expected [sequences + 1]")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, expected {x.device} like {name}")
    if x.shape[0] != 1:
        raise ValueError(f"{name} has shape {list(x.shape)}, expected B = 1 when cu_seqlens packs the sequences")
    return shape[0] - 1


def validate_clip(state_clip: float | None) -> None:
    if state_clip is not None and not (isinstance(state_clip, int | float) and state_clip > 0):
        kind = type(state_clip).__name__
        raise ValueError(f"state_clip is {state_clip!r} ({kind}), expected a positive number or None")


def validate_offsets(cu_seqlens: Tensor | None, steps: int) -> None:
    """What needs the values of ``cu_seqlens``, and so happens inside the operator, where a compiler does not look."""
    if cu_seqlens is None or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != steps or any(a > b for a, b in itertools.pairwise(offsets)):
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"cu_seqlens is {shown}, expected offsets that rise from 0 to T = {steps}")


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
    match _resolve(backend, q, k, v, f, weight):
        case "reference":
            with torch.no_grad():
                y, final = reference.scan(q, k, v, f, weight, initial_state, cu_seqlens)
            return y, final.clone(), final.new_empty(0)
        case name:
            return _kernels(name).forward(q, k, v, f, weight, initial_state, cu_seqlens, save)  # type: ignore[no-any-return]


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
    heads = head_count(q, k, v, f, weight)
    dtype = state_dtype(q, k, v, f, weight)
    state = (heads, q.shape[3], v.shape[3])
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = v.new_empty(*q.shape[:2], heads, v.shape[3], dtype=output_dtype(q, k, v))
    final = q.new_empty(sequences, *state, dtype=dtype)
    name = _resolve(backend, q, k, v, f, weight)
    if name == "reference":
        return y, final, final.new_empty(0)
    count = 0
    if save:  # a chunk length that depends on T binds an exported program to a range of T
        chunk = {"cuda": CUDA_CHUNK, "triton": TRITON_CHUNK}.get(name) or chunk_length(q.shape[1])
        # CUDA's chunks start at multiples of their length, packed or not; the others' where a sequence starts
        packed = cu_seqlens is not None and name != "cuda"
        count = saved_states(q.shape[0], q.shape[1], packed, chunk)
    if name == "cuda":
        parts = cuda_parts(y.dtype, q.shape[1], cu_seqlens)
        saved_dtype = y.dtype if parts == 1 else dtype
        return y, final, final.new_empty(count, *state[:2], cuda_width(state[2]), dtype=saved_dtype)
    return y, final, final.new_empty(count, *state)


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
    if dy is None:
        heads = head_count(q, k, v, f, weight)
        dy = v.new_zeros(*q.shape[:2], heads, v.shape[3], dtype=output_dtype(q, k, v))
    match _resolve(backend, q, k, v, f, weight):
        case "reference":
            *gradients, d_initial = reference.scan_backward(
                dy, d_final, q, k, v, f, weight, initial_state, cu_seqlens, state_clip
            )
        case name:
            *gradients, d_initial = _kernels(name).backward(
                dy, d_final, q, k, v, f, weight, initial_state, saved, cu_seqlens, state_clip
            )
    return *gradients, q.new_empty(0) if d_initial is None else d_initial  # type: ignore[return-value]


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
