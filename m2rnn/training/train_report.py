"""What ``m2rnn train`` shows besides its progress: the plan of a run, the table at its end, the plot of its loss."""

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode

from m2rnn.data.token_files import TokenDataset
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM
from m2rnn.models.sizes import size_of
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import LOG, write_whole_file
from m2rnn.runs.machine import memory_of
from m2rnn.training.monitor import duration
from m2rnn.training.train_settings import TrainSettings

PLOT = "loss.png"
MOST_TOKENS = 2**32  # of a micro-batch that is planned


def plan(
    settings: TrainSettings,
    config: M2RNNConfig,
    data: TokenDataset,
    processes: int,
    bfloat16: bool,
    there: int | None = None,
) -> str:
    """Sizes, schedule and memory of a run, as a table; ``there`` are the bytes that the device has."""
    size = size_of(config, settings.context)
    step_tokens = settings.context * settings.batch_size
    tokens = settings.steps * step_tokens
    accumulation = settings.accumulation(processes)
    memory = memory_per_process(settings, config, processes, bfloat16)
    peak_end = settings.min_learning_rate * settings.learning_rate
    shared = "sharded (FSDP2)" if settings.fsdp and processes > 1 else "whole in each process"
    rows = [
        ("model", f"{settings.preset}: {size.parameters:,} parameters, {size.active:,} active"),
        ("data", f"{data.folder}: {data.num_tokens:,} tokens, {data.num_documents:,} documents"),
        ("step", f"{settings.batch_size:,} sequences of {settings.context:,} tokens: {step_tokens:,}"),
        ("", f"{processes} process(es) × {accumulation} × {settings.micro_batch_size} sequences"),
        ("steps", f"{settings.steps:,}: {tokens:,} tokens, {tokens / data.num_tokens:.2f} epochs"),
        (
            "learning rate",
            f"0 to {settings.learning_rate:g} in {settings.warmup:,} steps, then a cosine to {peak_end:g}",
        ),
        ("AdamW", f"betas {settings.beta1}, {settings.beta2}, epsilon {settings.epsilon:g}"),
        ("", f"weight decay {settings.weight_decay:g}, gradient norm at most {settings.max_gradient_norm:g}"),
        ("precision", f"{'bfloat16 autocast, ' if bfloat16 else ''}weights and moments float32, {shared}"),
        ("work", f"{size.training_flops * tokens:.3g} FLOP"),
        ("memory", "each process, about:"),
        *((f"  {name}", _gib(amount)) for name, amount in memory.items()),
        *([] if there is None else [("  there is", _gib(there))]),
    ]
    return "\n".join(f"{title:<15} {text}" for title, text in rows)


def check_memory(
    settings: TrainSettings, config: M2RNNConfig, processes: int, bfloat16: bool, device: torch.device
) -> None:
    """Raise `SettingsError` for a run whose plan needs more memory than there is, before the first step needs it.

    The kernel kills a process that takes too much, without a word. Compiled layers may keep less than is planned, so
    half of the activations are not counted then.
    """
    there = memory_of(device)
    if there is None:
        return
    planned = memory_per_process(settings, config, processes, bfloat16)
    needed = planned["together"] - (planned.get("activations", 0) / 2 if settings.compile else 0)
    if device.type == "cpu":  # which the processes of a machine share
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed > there:
        raise SettingsError(
            f"context {settings.context:,} with micro_batch_size {settings.micro_batch_size:,}: "
            f"training {settings.preset} needs about {_gib(needed)} of memory, and this {device.type.upper()} has "
            f"{_gib(there)}. Expected a smaller context, micro_batch_size or model, or checkpoint_activations=true; "
            "--dry-run shows the plan"
        )


def _gib(amount: float) -> str:
    return f"{amount / 2**30:,.2f} GiB"


def memory_per_process(
    settings: TrainSettings, config: M2RNNConfig, processes: int, bfloat16: bool
) -> dict[str, float]:
    """Bytes of weights, gradients, moments, and of what one micro-batch keeps for its backward pass.

    The last is counted in a forward pass without data, of one sequence a row, in one precision throughout, but for
    mixtures of experts; packing and temporary buffers come on top.
    """
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    with torch.device("meta"):
        model = M2RNNForCausalLM(config).train().to(dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = parameters / (processes if settings.fsdp else 1)
    each = {"weights": 4 * share, "gradients": 4 * share, "moments": 8 * share}
    if "moe" not in config.mlps:  # whose work depends on the data
        each["activations"] = _kept_for_backward(model, settings)
    return {**each, "together": sum(each.values())}


def _kept_for_backward(model: M2RNNForCausalLM, settings: TrainSettings) -> float:
    if settings.micro_batch_size * settings.context > MOST_TOKENS:
        return math.inf
    ids = torch.zeros(settings.micro_batch_size, settings.context, dtype=torch.long, device="meta")
    if settings.checkpoint_activations:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    try:
        with _LinearAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, labels=ids, num_items_in_batch=1)
    except (RuntimeError, ArithmeticError):  # a size that no integer of torch's holds
        return math.inf
    return float(sum(storage.nbytes() for storage in kept.values()))


class _LinearAttention(TorchFunctionMode):
    """Attention that keeps what torch's fused kernels keep: without data torch would take the one that keeps scores."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _InputsKept.apply(*args[:3])  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))


class _InputsKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return q.new_empty(*q.shape[:-1], v.shape[-1])


def table(results: dict[str, Any], folder: Path) -> str:
    """The results, for people."""
    valid, utilisation = results["valid"], results["mfu"]
    rows = [
        ("steps", f"{results['steps']:,} ({results['tokens']:,} tokens) in {duration(results['seconds'])}"),
        ("loss", f"{results['loss']:.4f}, mean of the last {results['loss_steps']} steps"),
    ]
    if valid is not None:
        rows.append(
            ("validation", f"{valid['loss']:.4f}, perplexity {valid['perplexity']:.3f}, {valid['tokens']:,} tokens")
        )
    if results["tokens_per_second"] is not None:
        used = "" if utilisation is None else f", MFU {utilisation:.1%}"
        rows.append(("speed", f"{results['tokens_per_second']:,.0f} tokens/s{used}"))
    memory = results.get("gpu_memory_bytes")  # older runs have none
    if memory is not None:
        rows.append(("memory", f"{memory / 2**30:.1f} GiB of a GPU at the most"))
    if results["spikes"]:
        rows.append(("loss spikes", f'{results["spikes"]}: see "spike" in {folder / LOG}'))
    return "\n".join(f"{title:<14}{text}" for title, text in rows)


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """What the run was on."""
    found = {"processes": processes, "torch": torch.__version__, "transformers": transformers.__version__}
    if device.type == "cuda":
        return found | {"gpu": torch.cuda.get_device_name(device)}
    return found | {"cores": os.cpu_count(), "threads": torch.get_num_threads()}


def write_plot(folder: Path) -> bool:
    """Plot the loss of log.jsonl against tokens; not without matplotlib, which the extra ``plot`` brings."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        return False
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    points = [(line["tokens"], line["loss"]) for line in lines if line["loss"] is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([tokens for tokens, _ in points], [loss for _, loss in points], color="#0072B2", linewidth=1)
    axes.set_xlabel("tokens")
    axes.set_ylabel("training loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())  # 50 k, 2 G
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_whole_file(folder / PLOT, content.getvalue())
    return True
