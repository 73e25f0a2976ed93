"""What the benchmark runs: the recurrence by each backend, and what others use in its place."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from m2rnn.bench.floor import Counts, attention_counts, scan_counts
from m2rnn.ops import m2rnn_scan
from m2rnn.ops.linear_scan import fla
from m2rnn.ops.scan import reference
from m2rnn.runs.errors import SettingsError

STATE_CLIP = 1.0  # as in the paper's models
GRADIENT = 1e-5  # of y: as small as that of a mean over the tokens of a step, so that the clip leaves it as it is
HEAD_DIM = 64  # of attention in the paper's models
DELTA_KEY_DIM, DELTA_VALUE_DIM = 256, 512  # of Gated DeltaNet in the paper's models
# Heads of attention and of Gated DeltaNet in the paper's models, by the size of their M2RNN's state.
HEADS_410M, HEADS_7B = (16, 2), (24, 3)
PAPER_HEADS = {84 * 64 * 16: HEADS_410M, 132 * 64 * 16: HEADS_7B}


@dataclass(frozen=True)
class Shape:
    """A problem: sequences, tokens of each, and the layer's heads, key and value channels."""

    batch: int
    steps: int
    heads: int
    key_dim: int = 64
    value_dim: int = 16

    def __str__(self) -> str:
        return f"B{self.batch} T{self.steps} N{self.heads} K{self.key_dim} V{self.value_dim}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """``B8T4096N84`` or ``B8 T4096 N84 K64 V16``."""
        match = re.fullmatch(r"B(\d+)T(\d+)N(\d+)(?:K(\d+))?(?:V(\d+))?", text.replace(" ", "").upper())
        numbers = [int(number) for number in match.groups() if number] if match else []
        if not match or 0 in numbers:
            raise SettingsError(f"shapes {text!r}: expected such as B8T4096N84 or B4T4096N66K64V32, numbers from 1")
        batch, steps, heads, key_dim, value_dim = match.groups()
        return cls(int(batch), int(steps), int(heads), int(key_dim or 64), int(value_dim or 16))

    @property
    def state(self) -> int:
        """Numbers in the state of a layer."""
        return self.heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class Tensors:
    """Inputs, all of which want a gradient, and the gradient of the output."""

    inputs: tuple[Tensor, ...]
    dy: Tensor


@dataclass(frozen=True)
class Contender:
    """How to run it: its tensors for a shape, the function of its inputs, its size in words, its counts."""

    tensors: Callable[[Shape, str, torch.dtype], Tensors]
    run: Callable[..., Tensor]
    size: Callable[[Shape], str]
    counts: Callable[[Shape, bool, int], Counts] | None
    devices: tuple[str, ...]


def forward(run: Callable[..., Tensor], tensors: Tensors) -> list[Tensor]:
    with torch.no_grad():
        return [run(*tensors.inputs)]


def forward_backward(run: Callable[..., Tensor], tensors: Tensors) -> list[Tensor]:
    y = run(*tensors.inputs)
    return [y.detach(), *torch.autograd.grad(y, tensors.inputs, tensors.dy)]


PASSES: dict[str, Callable[[Callable[..., Tensor], Tensors], list[Tensor]]] = {
    "forward": forward,
    "forward + backward": forward_backward,
}


def scan_inputs(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The paper's heads: one of q and k, N of v, f and W. f and W are float32, as the layer passes them."""
    generator = torch.Generator(device).manual_seed(0)
    normal: Any = partial(torch.randn, generator=generator, device=device)
    lead, value_dim = (shape.batch, shape.steps), shape.value_dim
    return (
        normal(*lead, 1, shape.key_dim, dtype=dtype),
        normal(*lead, 1, shape.key_dim, dtype=dtype),
        normal(*lead, shape.heads, value_dim, dtype=dtype),
        torch.rand(*lead, shape.heads, generator=generator, device=device),
        normal(shape.heads, value_dim, value_dim) / value_dim**0.5,
    )


def _with_gradients(inputs: tuple[Tensor, ...], output: Tensor) -> Tensors:
    generator = torch.Generator(output.device).manual_seed(1)
    dy = torch.randn(output.shape, dtype=output.dtype, device=output.device, generator=generator)
    dy *= GRADIENT
    return Tensors(tuple(x.detach().requires_grad_() for x in inputs), dy)


def _scan_tensors(shape: Shape, device: str, dtype: torch.dtype) -> Tensors:
    inputs = scan_inputs(shape, device, dtype)
    return _with_gradients(inputs, inputs[2])


def _scan(*inputs: Tensor, backend: str) -> Tensor:
    return m2rnn_scan(*inputs, state_clip=STATE_CLIP, backend=backend)[0]


def _reference(*inputs: Tensor) -> Tensor:
    """The definition under autograd: what a user would write in PyTorch."""
    q, k, v, f, weight = inputs
    return reference.scan(q, k, v, f, weight, state_clip=STATE_CLIP)[0]


def attention_heads(shape: Shape) -> int:
    """Those of the paper's model, else as many as give attention the width of the layer's output."""
    paper = PAPER_HEADS.get(shape.state)
    return paper[0] if paper else max(1, round(shape.heads * shape.value_dim / HEAD_DIM))


def _attention_tensors(shape: Shape, device: str, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    size = (3, shape.batch, attention_heads(shape), shape.steps, HEAD_DIM)
    q, k, v = torch.randn(size, generator=generator, device=device, dtype=dtype).unbind()
    return _with_gradients((q, k, v), v)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attention_counts(shape: Shape, backward: bool, item: int) -> Counts:
    return attention_counts(shape.batch, shape.steps, attention_heads(shape), HEAD_DIM, backward, item)


def delta_heads(shape: Shape) -> int:
    return PAPER_HEADS.get(shape.state, HEADS_410M)[1]


def _delta_tensors(shape: Shape, device: str, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    normal: Any = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    lead = (shape.batch, shape.steps, delta_heads(shape))
    q, k, v = normal(*lead, DELTA_KEY_DIM), normal(*lead, DELTA_KEY_DIM), normal(*lead, DELTA_VALUE_DIM)
    log_decay, beta = F.logsigmoid(normal(*lead).float()), normal(*lead).sigmoid()
    return _with_gradients((q, k, v, log_decay, beta), v)


def _delta(*inputs: Tensor) -> Tensor:
    q = inputs[0]
    reason = fla.why_not(q.device, q.dtype, DELTA_KEY_DIM, trained=torch.is_grad_enabled(), delta=True)
    if reason is not None:
        raise RuntimeError(reason)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    fla.drop_wrong_configurations(q.device)
    y: Tensor = chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True)[0]
    return y


def _scan_contender(run: Callable[..., Tensor], *devices: str) -> Contender:
    return Contender(_scan_tensors, run, lambda shape: f"{shape.heads} heads", scan_counts, devices)


CONTENDERS = {
    "cuda": _scan_contender(partial(_scan, backend="cuda"), "cuda"),
    "triton": _scan_contender(partial(_scan, backend="triton"), "cuda"),
    "cpu": _scan_contender(partial(_scan, backend="cpu"), "cpu"),
    "reference": _scan_contender(_reference, "cuda", "cpu"),
    "sdpa": Contender(
        _attention_tensors,
        _attention,
        lambda shape: f"{attention_heads(shape)} heads of {HEAD_DIM}",
        _attention_counts,
        ("cuda", "cpu"),
    ),
    "gated_deltanet": Contender(
        _delta_tensors,
        _delta,
        lambda shape: f"{delta_heads(shape)} heads of {DELTA_KEY_DIM} × {DELTA_VALUE_DIM}",
        None,  # how much it does at least depends on how it is cut into chunks
        ("cuda",),
    ),
}
BACKENDS = ("cuda", "triton", "cpu", "reference")  # of the recurrence; the others are something else


def contenders_on(device: str) -> tuple[str, ...]:
    """Names of all that can in principle run on a type of device."""
    return tuple(name for name, contender in CONTENDERS.items() if device in contender.devices)
