"""Linear recurrences with a matrix state per head: the gated delta rule and gated linear attention.

Gated DeltaNet and Gated DeltaProduct compute the first, Mamba-2 the second. Both run in chunks of time steps: inside
a chunk as products of matrices, all chunks at once, and from chunk to chunk in a loop over states.

Dimensions, as they appear in names such as ``k_MHJK``:
    B batch · T time · H heads · K key channels (rows of the state) · V value channels (its columns) · N sequences
    M chunks of all sequences · C tokens of a chunk · n writes of a token · J = C n writes of a chunk
"""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, pairwise
from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn.ops.linear_scan import fla

CPU_CHUNK, GPU_CHUNK = 32, 64  #: most writes in a chunk: more are fewer steps of the loop and larger products
_BACKENDS = ("torch", "fla")

Update = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def gated_delta_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule with n writes a token: a forgetting state, corrected towards v where it is read by k.

    For each sequence and head, with a state S of K rows and V columns::

        S_t = exp(g_t) S_{t-1},   then for j = 1 … n:   S_t ← S_t + β_{t,j} k_{t,j} (v_{t,j} - S_tᵀ k_{t,j})ᵀ
        y_t = S_tᵀ q_t

    With keys of length 1 the state's transition has the eigenvalue 1 - β along k: β in [0, 2] allows [-1, 1].

    Args:
        q: Queries ``[B, T, H, K]``.
        k: Keys ``[B, T, n, H, K]``, of length at most 1 for a bounded state with β in [0, 2].
        v: Values ``[B, T, n, H, V]``.
        log_decay: g ``[B, T, H]``, at most 0.
        beta: β ``[B, T, n, H]``.
        initial_state: S_0 ``[B, H, K, V]``, or ``[N, H, K, V]`` for N packed sequences; zeros if None.
        cu_seqlens: Offsets ``[N + 1]`` of sequences packed one after the other along T; B is 1.
        backend: ``"torch"``, ``"fla"`` (kernels of flash-linear-attention), or None: the kernels where they can run.
            A single token of each sequence, as in decoding, is always torch's.

    Returns:
        y ``[B, T, H, V]`` in the narrowest dtype of q, k and v, and S_T of every sequence, in float32 (float64 for
        float64 queries).

    Raises:
        ValueError: The backend is unknown or cannot run here; the message says why.

    Source: Gated Delta Networks (arXiv 2412.06464); with n writes, DeltaProduct (arXiv 2502.10297).
    """
    narrow = _narrowest(q, k, v)
    one_token = q.shape[1] == 1 and cu_seqlens is None
    if not one_token and q.numel():
        trained = _wants_gradient(q, k, v, log_decay, beta, initial_state)
        if _resolve(backend, q.device, narrow, q.shape[-1], trained=trained, delta=True) == "fla":
            q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
            return fla.gated_delta(q, k, v, log_decay, beta, initial_state, cu_seqlens)
    with _full_precision(q.device.type):
        dtype = _state_dtype(q)
        state = _first_state(initial_state, q, q.shape[2], v.shape[-1], cu_seqlens)
        q, k, v, log_decay, beta = (x.to(dtype) for x in (q, k, v, log_decay, beta))
        if one_token:
            y, state = _delta_step(q, k, v, log_decay, beta, state)
        else:
            y, state = _delta_chunks(q, k, v, log_decay, beta, state, cu_seqlens)
    return y.to(narrow), state


def gated_linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention that forgets: the state-space duality of Mamba-2, with C as q, B as k and dt ⊙ x as v.

    For each sequence and head, with a state S of K rows and V columns::

        S_t = exp(g_t) S_{t-1} + k_t v_tᵀ
        y_t = S_tᵀ q_t

    Args:
        q: Queries ``[B, T, G, K]``, for G groups of heads.
        k: Keys ``[B, T, G, K]``; head h of H reads query and key ``h // (H / G)``.
        v: Values ``[B, T, H, V]``.
        log_decay: g ``[B, T, H]``, at most 0.
        initial_state: As in ``gated_delta_scan``; so are cu_seqlens, backend and the results.
        cu_seqlens: See initial_state.
        backend: See initial_state.

    Source: Transformers are SSMs (arXiv 2405.21060).
    """
    narrow = _narrowest(q, k, v)
    one_token = q.shape[1] == 1 and cu_seqlens is None
    if not one_token and q.numel():
        trained = _wants_gradient(q, k, v, log_decay, initial_state)
        if _resolve(backend, q.device, narrow, q.shape[-1], trained=trained, delta=False) == "fla":
            q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
            return fla.gated_linear(q, k, v, log_decay, initial_state, cu_seqlens)
    with _full_precision(q.device.type):
        dtype = _state_dtype(q)
        state = _first_state(initial_state, q, v.shape[2], v.shape[-1], cu_seqlens)
        q, k, v, log_decay = (x.to(dtype) for x in (q, k, v, log_decay))
        if one_token:
            y, state = _linear_step(q, k, v, log_decay, state)
        else:
            y, state = _linear_chunks(q, k, v, log_decay, state, cu_seqlens)
    return y.to(narrow), state


def _resolve(
    backend: str | None, device: torch.device, dtype: torch.dtype, key_dim: int, *, trained: bool, delta: bool
) -> str:
    """The backend that runs."""
    if backend not in (None, *_BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)} or None, got {backend!r}")
    if backend == "torch" or (backend is None and device.type != "cuda"):
        return "torch"
    reason = fla.why_not(device, dtype, key_dim, trained=trained, delta=delta)
    if reason is None:
        return "fla"
    if backend == "fla":
        raise ValueError(f"backend 'fla' cannot run: {reason}")
    _warn_fallback(reason)
    return "torch"


@functools.cache
def _warn_fallback(reason: str) -> None:
    warnings.warn(
        f"the linear recurrences run in plain PyTorch on this GPU, slower and with more memory: {reason}", stacklevel=2
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _narrowest(*tensors: Tensor) -> torch.dtype:
    """The dtype with the fewest bits: what a caller has rounded to 16 bits was meant to be computed in 16 bits."""
    return sorted((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)[0]  # torch.compile knows no min


def _full_precision(device: str) -> contextlib.AbstractContextManager[None]:
    """Without autocast: sums over many tokens are in the state's dtype."""
    if device == "meta":  # has no autocast; torch.compile cannot ask torch.amp.is_autocast_available()
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _first_state(initial: Tensor | None, q: Tensor, heads: int, values: int, cu_seqlens: Tensor | None) -> Tensor:
    if initial is not None:
        return initial.to(_state_dtype(q))
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros(sequences, heads, q.shape[-1], values, dtype=_state_dtype(q))


def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of each sequence, as the definition says."""
    state = state * log_decay[:, 0, :, None, None].exp()
    for k_BHK, v_BHV, beta_BH in zip(k[:, 0].unbind(1), v[:, 0].unbind(1), beta[:, 0].unbind(1), strict=True):
        read = (k_BHK[..., None, :] @ state).squeeze(-2)
        state = state + k_BHK[..., None] * (beta_BH[..., None] * (v_BHV - read))[..., None, :]
    return (q[:, 0, :, None] @ state).transpose(1, 2), state


def _linear_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence, as the definition says."""
    shared = v.shape[2] // k.shape[2]
    q_BHK, k_BHK = (x[:, 0].repeat_interleave(shared, 1) for x in (q, k))
    state = state * log_decay[:, 0, :, None, None].exp() + k_BHK[..., None] * v[:, 0, :, None]
    return (q_BHK[..., None, :] @ state).transpose(1, 2), state


def _delta_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Whole chunks: with u the corrections that a chunk writes, S_end = S_0 + Kᵀ u and (1 + A) u = β (v - K S_0).

    A couples a write to those before it in its chunk. Decays multiply each term by what time has left of it. The
    solution u = (1 + A)⁻¹ β v - (1 + A)⁻¹ β K S_0 takes S_0 last, in a product: the rest is for all chunks at once.
    """
    writes = k.shape[2]
    chunks = _Chunks(q, cu_seqlens, writes)
    q_MHCK = chunks.split(q).transpose(1, 2)
    k_MHJK, v_MHJV = (chunks.split(x).permute(0, 3, 1, 2, 4).flatten(2, 3) for x in (k, v))
    beta_MHJ1 = chunks.split(beta).permute(0, 3, 1, 2).flatten(2)[..., None]
    decay_MHC = _sum_from_start(chunks.split(log_decay).transpose(1, 2))
    decay_MHJ = decay_MHC.repeat_interleave(writes, 2)

    token_C, token_J = (torch.arange(x.shape[2], device=q.device) for x in (decay_MHC, decay_MHJ))
    seen_CJ = token_J // writes <= token_C[:, None]
    earlier_JJ = token_J < token_J[:, None]
    A_MHJJ = beta_MHJ1 * (k_MHJK @ k_MHJK.mT) * _decay_between(decay_MHJ, decay_MHJ, earlier_JJ, q.dtype)
    scores_MHCJ = (q_MHCK @ k_MHJK.mT) * _decay_between(decay_MHC, decay_MHJ, seen_CJ, q.dtype)
    from_start_MHJ1 = decay_MHJ[..., None].exp().to(q.dtype)
    right_side = torch.cat([v_MHJV, from_start_MHJ1 * k_MHJK], -1) * beta_MHJ1
    solved = torch.linalg.solve_triangular(A_MHJJ, right_side, upper=False, unitriangular=True)
    u_MHJV, w_MHJK = solved.split((v.shape[-1], k.shape[-1]), -1)
    q_MHCK = q_MHCK * decay_MHC[..., None].exp().to(q.dtype)
    end_MH11 = decay_MHC[..., -1:, None]
    k_MHJK = k_MHJK * (end_MH11 - decay_MHJ[..., None]).exp().to(q.dtype)
    end_MH11 = end_MH11.exp().to(q.dtype)

    def update(at: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        u = u_MHJV[at] - w_MHJK[at] @ state
        y = q_MHCK[at] @ state + scores_MHCJ[at] @ u
        return y, end_MH11[at] * state + k_MHJK[at].mT @ u

    y_MHCV, state = chunks.scan(update, state)
    return chunks.join(y_MHCV.transpose(1, 2)), state


def _linear_chunks(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Whole chunks. The R heads of a group are side by side as columns of one state [K, R V]: their q and k are one."""
    chunks = _Chunks(q, cu_seqlens, 1)
    groups, values = k.shape[2], v.shape[-1]
    q_MGCK, k_MGCK = (chunks.split(x).transpose(1, 2) for x in (q, k))
    v_MGRCV = chunks.split(v).transpose(1, 2).unflatten(1, (groups, -1))
    decay_MGRC = _sum_from_start(chunks.split(log_decay).transpose(1, 2).unflatten(1, (groups, -1)))

    token_C = torch.arange(q_MGCK.shape[2], device=q.device)
    decays = _decay_between(decay_MGRC, decay_MGRC, token_C <= token_C[:, None], q.dtype)
    y_MGRCV = ((q_MGCK @ k_MGCK.mT)[:, :, None] * decays) @ v_MGRCV
    end_MGR1 = decay_MGRC[..., -1:]
    to_end_MGRC1 = (end_MGR1 - decay_MGRC).exp().to(q.dtype)[..., None]
    new_MGKX = k_MGCK.mT @ (to_end_MGRC1 * v_MGRCV).transpose(2, 3).flatten(3)
    end_MG1X = end_MGR1.exp().to(q.dtype).transpose(2, 3).repeat_interleave(values, 3)

    def update(at: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        return q_MGCK[at] @ state, end_MG1X[at] * state + new_MGKX[at]

    state = state.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)  # [N, H, K, V] to [N, G, K, R V]
    y_MGCX, state = chunks.scan(update, state)
    y_MGRCV = y_MGRCV + decay_MGRC.exp().to(q.dtype)[..., None] * y_MGCX.unflatten(3, (-1, values)).transpose(2, 3)
    state = state.unflatten(3, (-1, values)).transpose(2, 3).flatten(1, 2)
    return chunks.join(y_MGRCV.flatten(1, 2).transpose(1, 2)), state


def _sum_from_start(log_decay: Tensor) -> Tensor:
    """Sums along the last dimension in float64: only their differences matter, which are much smaller.

    Decays to nothing, whatever their logarithm, are exp(-1000) = 0: beside -inf or 1e20 a sum keeps nothing else.
    """
    sums = log_decay.double().clamp(min=-1000.0)
    if not sums.is_cuda:
        return sums.cumsum(-1)
    shift = 1  # PyTorch's cumsum on a GPU has no fixed order, and refuses deterministic mode
    while shift < sums.shape[-1]:
        sums = sums + F.pad(sums[..., :-shift], (shift, 0))
        shift *= 2
    return sums


def _decay_between(later: Tensor, earlier: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(later - earlier)`` [..., rows, columns] where a row has seen a column, 0 elsewhere."""
    difference = (later[..., None] - earlier[..., None, :]).to(dtype)
    return difference.masked_fill(~seen, -torch.inf).exp()


class _Chunks:
    """How sequences are cut: the first chunks of all sequences, then the second ones, and so on.

    Sequences with more chunks come first among them, so that those that go on are always the first rows of a state.
    """

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None, writes: int) -> None:
        batch, steps = (index(n) for n in tokens.shape[:2])  # numbers for torch.compile too, which repeats chunks
        self._shape = (batch, steps)
        bounds = [row * steps for row in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        longest = (CPU_CHUNK if tokens.device.type == "cpu" else GPU_CHUNK) // writes
        self._length = max(1, min(longest, max(lengths, default=0)))
        counts = [-(-length // self._length) for length in lengths]
        order = sorted(range(len(counts)), key=lambda n: -counts[n])
        ended = Counter(counts)
        #: sequences that have a first, second, … chunk
        self._active = [len(counts) - n for n in accumulate(ended[step] for step in range(max([1, *counts])))]
        first = [0, *accumulate(self._active)]
        self._count = first[-1]

        def vector(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=tokens.device)

        self._order = vector(order)
        self._rank = self._order.argsort()
        row = torch.arange(len(lengths), device=tokens.device)
        sequence = row.repeat_interleave(vector(lengths), output_size=batch * steps)
        position = torch.arange(batch * steps, device=tokens.device) - vector(bounds)[sequence]
        chunk = vector(first)[position // self._length] + self._rank[sequence]
        self._slots = chunk * self._length + position % self._length

    def split(self, x: Tensor) -> Tensor:
        """``[B, T, …]`` to ``[M, C, …]``, zeros where a sequence has ended."""
        grid = x.new_zeros(self._count * self._length, *x.shape[2:])
        grid = grid.index_copy(0, self._slots, x.flatten(0, 1))
        return grid.view(self._count, self._length, *x.shape[2:])

    def join(self, y: Tensor) -> Tensor:
        """``[M, C, …]`` to ``[B, T, …]``."""
        return y.flatten(0, 1).index_select(0, self._slots).view(*self._shape, *y.shape[2:])

    def scan(self, update: Update, state: Tensor) -> tuple[Tensor, Tensor]:
        """From chunk to chunk by ``update(chunks, states) -> (outputs, states)``: all outputs, the final states."""
        state = state.index_select(0, self._order)
        outputs, ended, first = [], [], 0
        for active in self._active:
            ended.append(state[active:])
            y, state = update(slice(first, first + active), state[:active])
            outputs.append(y)
            first += active
        final = torch.cat([state, *reversed(ended)]).index_select(0, self._rank)
        return torch.cat(outputs), final
