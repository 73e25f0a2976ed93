"""Training throughput of whole models on one device: tokens per second, MFU and memory, and ratios to the first model.

    python benchmarks/training_throughput.py                                  # the paper's 410M models on a GPU
    python benchmarks/training_throughput.py --context 4096 --model hybrid-gdn-410m --model hybrid-gdn-m2rnn1-410m
    python benchmarks/training_throughput.py --device cpu --no-compile --tokens 256 --context 64 \\
        --model tiny-hybrid-gdn --model tiny-hybrid-gdn-m2rnn1                # the same on a laptop

A step is that of `m2rnn train` on one GPU: random tokens, packed as there, documents as long as the context; bfloat16
autocast with float32 weights, each layer compiled, the loss in chunks, gradients clipped, fused AdamW. The models take
turns, forwards and backwards, so that a change of the device's clock meets all: each is built, warmed up, timed and
freed. The time of a step is the median over all turns. MFU counts the model's own operations (`m2rnn presets`), without
what is computed again.
"""

import argparse
import gc
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM, presets
from m2rnn.models.sizes import size_of
from m2rnn.ops.linear_scan import fla
from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.machine import default_device, hardware, versions
from m2rnn.training.throughput import peak_flops

MODELS = ["hybrid-gdn-410m", "hybrid-gdn-m2rnn1-410m", "m2rnn-410m", "transformer-410m"]
COLUMNS = ["context", "model", "ms_per_step", "spread", "tokens_per_second", "ratio", "mfu", "gigabytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help=f"a preset; the first is 100 %% (default: {', '.join(MODELS)})"
    )
    parser.add_argument("--context", type=int, action="append", help="tokens of a sequence (default: 4096 and 16384)")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a turn (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=3, help="steps before them (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="turns of each model (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint-activations", action="store_true", help="less memory, more work")
    parser.add_argument("--device", default=default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--csv", type=Path, default=Path("training_throughput.csv"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.model is None:
        parser.error("no GPU: give --model, such as tiny-hybrid-m2rnn; the 410M models are for a GPU")
    contexts = arguments.context or [4096, 16384]
    for context in contexts:
        if context < 1 or arguments.tokens % context:
            parser.error(f"--context {context}: expected a divisor of --tokens {arguments.tokens}")
    for name in ("steps", "warm", "turns"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: expected at least 1")
    models = arguments.model or MODELS
    try:
        configs = {name: presets.get(name) for name in models}
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(arguments.device)
    machine = hardware(arguments.device) | versions(
        ["m2rnn", "torch", "triton", "transformers", "flash-linear-attention"]
    )
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for rule, delta in (("Gated DeltaNet", True), ("Mamba-2", False)):
        reason = fla.why_not(device, torch.bfloat16, fla.LARGEST_KEY, trained=True, delta=delta)
        print(f"{rule} by {'kernels of flash-linear-attention' if reason is None else f'PyTorch: {reason}'}")
    torch._dynamo.config.recompile_limit = 64  # several models, whose layers are all one function to it
    settings = {name: getattr(arguments, name) for name in ("tokens", "compile", "checkpoint_activations")}

    rows = []
    for context in contexts:
        turns: dict[str, list[Turn]] = {name: [] for name in configs}
        for number in range(arguments.turns):
            order = list(configs) if number % 2 == 0 else list(configs)[::-1]
            for name in order:
                began = time.monotonic()
                turn = Turn(configs[name], context, device, arguments)
                turns[name].append(turn)
                took = time.monotonic() - began
                print(f"context {context}, {name}, turn {number + 1}: {turn} ({took:.0f} s in all)", flush=True)
        found = [row_of(name, configs[name], context, turns[name], arguments.tokens, device) for name in configs]
        for row in found:
            if row["ms_per_step"] and found[0]["ms_per_step"]:
                row["ratio"] = found[0]["ms_per_step"] / row["ms_per_step"]
        rows += found
        write_csv(arguments.csv, [row | settings | machine for row in rows])  # whatever comes later
    print()
    show(rows, COLUMNS)


class Turn:
    """Seconds of each timed step of a new model, the largest memory in use, and what went wrong, if anything did."""

    def __init__(self, config: M2RNNConfig, context: int, device: torch.device, arguments: argparse.Namespace) -> None:
        self.seconds: list[float] = []
        self.memory: int | None = None
        self.failure: str | None = None
        try:
            self._run(config, context, device, arguments)
        except (RuntimeError, ValueError) as error:
            self.failure = str(error).partition("\n")[0][:200]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, config: M2RNNConfig, context: int, device: torch.device, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with device:
            model = M2RNNForCausalLM(config).train()
        if arguments.checkpoint_activations:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if arguments.compile:
            for block in model.model.layers:
                block.compile()
        spared = model.no_weight_decay()
        groups = [
            {"params": [x for name, x in model.named_parameters() if (x.dim() > 1 and name not in spared) == decays],
             "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-10, fused=device.type == "cuda")
        batch = random_batch(config.vocab_size, arguments.tokens, context, device)
        for number in range(arguments.warm + arguments.steps):
            began = clock(device)
            step(model, optimizer, batch, device)
            if number >= arguments.warm:
                self.seconds.append(clock(device) - began)
        if device.type == "cuda":
            self.memory = torch.cuda.max_memory_allocated()

    def __str__(self) -> str:
        return self.failure or f"{statistics.median(self.seconds) * 1e3:.1f} ms a step"


def random_batch(vocab_size: int, tokens: int, context: int, device: torch.device) -> dict[str, Tensor]:
    """What the data of a training gives: documents as long as the context, end to end."""
    ids = torch.randint(vocab_size, (1, tokens + 1), device=device)
    starts = torch.arange(0, tokens + 1, context, dtype=torch.int32, device=device)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "shift_labels": ids[:, 1:], "cu_seq_lens_q": starts}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clock(device: torch.device) -> float:
    """Seconds, after all work so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def row_of(
    name: str, config: M2RNNConfig, context: int, turns: list[Turn], tokens: int, device: torch.device
) -> dict[str, Any]:
    size = size_of(config, context)
    row: dict[str, Any] = {"context": context, "model": name, "parameters": size.parameters, "ratio": None}
    seconds = sorted(second for turn in turns for second in turn.seconds)
    failures = [turn.failure for turn in turns if turn.failure]
    row |= dict.fromkeys(["ms_per_step", "spread", "tokens_per_second", "mfu", "gigabytes"])
    row["failure"] = failures[0] if failures else None
    if seconds and not failures:
        median, peak = statistics.median(seconds), peak_flops(device)
        medians = [statistics.median(turn.seconds) for turn in turns]
        row["ms_per_step"], row["tokens_per_second"] = median * 1e3, tokens / median
        row["spread"] = (max(medians) - min(medians)) / median  # between turns: smaller differences mean nothing
        row["mfu"] = None if peak is None else tokens / median * size.training_flops / peak
        memory = [turn.memory for turn in turns if turn.memory is not None]
        row["gigabytes"] = max(memory) / 1e9 if memory else None
    return row


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    shown = {
        "ms_per_step": "{:.1f}", "spread": "{:.1%}", "tokens_per_second": "{:,.0f}", "ratio": "{:.1%}", "mfu": "{:.1%}",
        "gigabytes": "{:.1f}",
    }  # fmt: skip
    cells = [
        names,
        *(["" if row[name] is None else shown.get(name, "{}").format(row[name]) for name in names] for row in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line, failure in zip(cells, [None, *(row["failure"] for row in rows)], strict=True):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), failure or "")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*")
    main()
