"""An M2RNN layer made to do what another mixer does, on the inputs that this one sees."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from m2rnn.layers import M2RNN, Packing
from m2rnn.runs.display import Display

LEARNING_RATE = 3e-3
RIDGE = 1e-3  # of the features' mean square


class Sample(NamedTuple):
    """A batch of what a mixer read and wrote, ``[1, tokens, hidden_size]`` each, and where its sequences lie."""

    inputs: Tensor
    outputs: Tensor
    packing: Packing | None


def fit(
    model: PreTrainedModel,
    mixer: nn.Module,
    m2rnn: M2RNN,
    batches: Sequence[Mapping[str, Any]],
    steps: int,
    display: Display,
    name: str,
) -> None:
    """Fit ``m2rnn`` to ``mixer``, a module of ``model``, on what the model feeds it for ``batches``.

    ``steps`` of AdamW on the squared error relative to the outputs' square, then the output projection exactly, by
    ridge regression on the layer's features.
    """
    display.say(f"{name}: running the model on {len(batches)} batches")
    samples = list(_samples(model, mixer, batches))
    _solve(m2rnn, samples)
    if steps:
        _descend(m2rnn, samples, steps, display, name)
        _solve(m2rnn, samples)


@torch.no_grad()
def _samples(model: PreTrainedModel, mixer: nn.Module, batches: Sequence[Mapping[str, Any]]) -> Iterator[Sample]:
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else kwargs["hidden_states"]
        seen.append((inputs, output[0] if isinstance(output, tuple) else output))

    training = model.training
    handle = mixer.register_forward_hook(look, with_kwargs=True)
    try:
        model.eval()
        for batch in batches:
            batch = {key: x.to(model.device) if isinstance(x, Tensor) else x for key, x in batch.items()}
            model(**{**batch, "use_cache": False})
            inputs, outputs = seen.pop()
            mask = batch.get("attention_mask")
            packing = None
            if mask is not None and not bool(mask.all()):
                padded = Packing.from_mask(mask)
                inputs, outputs, packing = padded.pack(inputs), padded.pack(outputs), padded.aligned
            yield Sample(inputs, outputs, packing)
    finally:
        handle.remove()
        model.train(training)


@torch.no_grad()
def _solve(m2rnn: M2RNN, samples: Sequence[Sample]) -> None:
    """The output projection of least squared error, in float64."""
    features: list[Tensor] = []
    handle = m2rnn.out_proj.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    width = m2rnn.out_proj.in_features
    try:
        squares = torch.zeros(width, width, dtype=torch.float64)
        products = torch.zeros(width, m2rnn.out_proj.out_features, dtype=torch.float64)
        for sample in samples:
            m2rnn(sample.inputs, None, sample.packing, output_state=False)
            x = features.pop().flatten(0, 1).double()
            y = sample.outputs.flatten(0, 1).double()
            squares += (x.T @ x).cpu()
            products += (x.T @ y).cpu()
    finally:
        handle.remove()
    squares.diagonal().add_(RIDGE * squares.diagonal().mean() + torch.finfo(torch.float64).tiny)
    m2rnn.out_proj.weight.copy_(torch.linalg.solve(squares, products, left=True).T)


@torch.enable_grad()
def _descend(m2rnn: M2RNN, samples: Sequence[Sample], steps: int, display: Display, name: str) -> None:
    narrow = m2rnn.out_proj.weight.dtype
    m2rnn.float()
    optimizer = torch.optim.AdamW(m2rnn.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        inputs, outputs, packing = samples[step % len(samples)]
        y, _ = m2rnn(inputs.float(), None, packing, output_state=False)
        loss = (y - outputs.float()).square().mean() / outputs.float().square().mean().clamp(min=1e-30)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(m2rnn.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        display.update(f"{name}: step {step + 1} of {steps}, error {loss.item():.3f} of the old mixer's output")
    m2rnn.zero_grad()
    m2rnn.to(narrow)
