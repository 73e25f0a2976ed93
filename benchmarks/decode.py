"""Decoding on a GPU: one layer of the paper's 410M model by batch size, its parts, and whole models' tokens per second.

    python benchmarks/decode.py                        # tables, and decode.csv
    python benchmarks/decode.py --batch 1 --batch 64 --dtype float16 --no-models

A layer is timed in a CUDA graph of 24 calls, as in a model: "cold" calls 24 layers, each with its own weights and
states, which come from the memory; "warm" calls one layer, whose weights (and at small batches states) stay in the
cache. Bytes are those that a token has to move: states once in each direction, weights, activations. The share is that
of the bandwidth of a copy within the GPU's memory, measured in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m2rnn.layers import M2RNN
from m2rnn.layers.projection import project_token
from m2rnn.models import M2RNNConfig, M2RNNForCausalLM
from m2rnn.ops.decode.operator import FEW_ROWS, decode_step
from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.machine import hardware, versions

CALLS = 24  # in a graph
REPEATS = 30
HIDDEN, HEADS, KEY, VALUE = 1024, 84, 64, 16
MODELS = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "layers": 4, "heads": 6, "key": 16, "mlp": 192},
    "410M": {"vocab_size": 100352, "hidden_size": HIDDEN, "layers": 24, "heads": HEADS, "key": KEY, "mlp": 2752},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, action="append", help="sequences (default: 1, 4, 16, 64 and 256)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--models", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--csv", type=Path, default=Path("decode.csv"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU")
    dtype = getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth()
    machine = hardware("cuda") | versions(["m2rnn", "torch", "transformers", "cuda-core"])
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"copy within the GPU's memory: {bandwidth / 1e12:.2f} TB/s\n")

    rows = [row for batch in arguments.batch or [1, 4, 16, 64, 256] for row in layer_rows(batch, dtype, bandwidth)]
    print(f"one layer, {arguments.dtype}: hidden {HIDDEN}, {HEADS} heads, K {KEY}, V {VALUE}")
    show(rows, ["batch", "what", "microseconds", "megabytes", "share"])
    if arguments.models:
        models = [model_row(name, batch, dtype) for name in MODELS for batch in (1, 16)]
        print("\nwhole models, by generate(): tokens per second of all sequences")
        show(models, ["batch", "what", "eager", "graph", "ratio", "microseconds"])
        rows += models
    settings = {"dtype": arguments.dtype, "copy_bandwidth": bandwidth}
    write_csv(arguments.csv, [row | settings | machine for row in rows])


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    cells = [names, *([format_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        padded[1] = row[1].ljust(widths[1])  # the only words
        print("  ".join(padded).rstrip())


def format_cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------- timing


def seconds_of_graph(calls: list[Callable[[], object]]) -> float:
    """Of one call, in a graph of all these calls: median over replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)  # the host is ahead when the clock starts
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times[5:])


def copy_bandwidth() -> float:
    """Bytes per second, read and written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds_of_graph([lambda: y.copy_(x)] * 4)


# -------------------------------------------------------------------------------------------------------- layer


@torch.no_grad()
def layer_rows(batch: int, dtype: torch.dtype, bandwidth: float) -> list[dict[str, Any]]:
    layers = [M2RNN(HIDDEN, HEADS, KEY, VALUE).to("cuda", dtype) for _ in range(CALLS)]
    hidden = torch.randn(batch, 1, HIDDEN, device="cuda", dtype=dtype)
    states = [layers[0](hidden)[1].static(1) for _ in layers]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in layers[0].parameters())
    projected = project_token(layers[0].in_proj, hidden[:, 0])
    mixed = torch.randn(batch, HEADS * VALUE, device="cuda", dtype=dtype)
    state_bytes = 2 * sum(x.numel() * x.element_size() for x in states[0])
    activations = 2 * (hidden.numel() + projected.numel() + mixed.numel()) * hidden.element_size()

    def chain(pairs: list[tuple[nn.Module, Any]]) -> list[Callable[[], object]]:
        """Each call takes the output of the one before, as in a model."""
        x = [hidden]

        def call(layer: nn.Module, state: Any) -> None:
            x[0] = layer(x[0], state)[0]

        return [lambda layer=layer, state=state: call(layer, state) for layer, state in pairs]

    measured = {
        "layer, cold": (chain(list(zip(layers, states, strict=True))), state_bytes + weights + activations),
        "layer, warm": (chain([(layers[0], states[0])] * CALLS), state_bytes + weights + activations),
    }
    small = [parameter for name, parameter in layers[0].named_parameters() if "proj" not in name]
    measured["its step, cold"] = (
        [lambda layer=x, state=s: step(layer, projected, state) for x, s in zip(layers, states, strict=True)],
        state_bytes + sum(x.numel() * x.element_size() for x in small) + projected.nbytes + mixed.nbytes,
    )
    for name, x in (("in_proj", hidden[:, 0]), ("out_proj", mixed)):
        modules = [getattr(layer, name) for layer in layers]
        bytes_moved = modules[0].weight.nbytes + x.nbytes + batch * modules[0].out_features * x.element_size()
        own = "own kernel" if batch <= FEW_ROWS else "cuBLAS"
        measured[f"its {name}, cold, {own}"] = ([lambda m=m, x=x: project_token(m, x) for m in modules], bytes_moved)
        if batch <= FEW_ROWS:
            measured[f"its {name}, cold, cuBLAS"] = ([lambda m=m, x=x: m(x) for m in modules], bytes_moved)

    rows = []
    for name, (calls, bytes_moved) in measured.items():
        seconds = seconds_of_graph(calls)
        share = bytes_moved / seconds / bandwidth
        rows.append(
            {
                "batch": batch,
                "what": name,
                "microseconds": seconds * 1e6,
                "megabytes": bytes_moved / 1e6,
                "share": share,
            }
        )
    return rows


def step(layer: M2RNN, projected: Tensor, state: Any) -> object:
    assert layer.conv is not None
    assert layer.norm is not None
    return decode_step(
        projected, state.recurrent, state.conv, layer.state_weight, layer.decay_gate.A_log, layer.decay_gate.dt_bias,
        conv_weight=layer.conv.weight, D=layer.D, norm_weight=layer.norm.weight, v_heads=HEADS, g_heads=HEADS,
        in_place=True,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- models


def model_row(name: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    sizes = MODELS[name]
    config = M2RNNConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        mixers=["m2rnn"] * sizes["layers"],
        mixer_options={"m2rnn": {"num_heads": sizes["heads"], "key_dim": sizes["key"], "value_dim": VALUE}},
        mlp_options={"swiglu": {"intermediate_size": sizes["mlp"]}},
        pad_token_id=0,
    )
    with torch.device("cuda"):
        model = M2RNNForCausalLM(config).to(dtype).eval()
    ids = torch.randint(sizes["vocab_size"], (batch, 16), device="cuda")

    def seconds_per_token(**arguments: Any) -> float:
        def seconds(tokens: int) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **arguments)
            torch.cuda.synchronize()
            return time.perf_counter() - start

        seconds(160)  # compiles, captures
        return statistics.median((seconds(160) - seconds(32)) / 128 for _ in range(3))

    eager, graph = seconds_per_token(), seconds_per_token(cache_implementation="static")
    return {
        "batch": batch, "what": f"{name}, {sum(x.numel() for x in model.parameters()) / 1e6:.0f}M parameters",
        "eager": batch / eager, "graph": batch / graph, "ratio": eager / graph, "microseconds": graph * 1e6,
    }  # fmt: skip


if __name__ == "__main__":
    main()
