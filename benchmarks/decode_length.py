"""Decoding by length of context: tokens per second and memory of whole models after 1,024 to 131,072 tokens.

    python benchmarks/decode_length.py                                      # the paper's 410M models on a GPU
    python benchmarks/decode_length.py --batch 16 --context 16384 --model m2rnn-410m --model transformer-410m
    python benchmarks/decode_length.py --device cpu --dtype float32 --tokens 4 --context 64 --model tiny-hybrid-m2rnn

No prompt of that length is read. The recurrent states are those after a few tokens, since their size does not depend on
the length, and the caches of attention are filled with random keys and values: what is in them decides neither the time
nor the memory of a token. Tokens are chosen greedily. "Eager" is a call of the model for each token with a cache that
grows; "graph" is what `generate(cache_implementation="static")` does on a GPU, a CUDA graph over a cache with room for
the tokens to come. The memory is the largest in use while the graph runs (without one, the model), weights included.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from m2rnn.layers.attention import AttentionState
from m2rnn.models import M2RNNForCausalLM, presets
from m2rnn.models.cache import M2RNNCache
from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.machine import default_device, hardware, versions

MODELS = ["m2rnn-410m", "hybrid-m2rnn-410m", "hybrid-gdn-m2rnn1-410m", "transformer-410m"]
CONTEXTS = [1024, 4096, 16384, 65536, 131072]
COLUMNS = ["model", "context", "eager", "graph", "ms_per_token", "cache_megabytes", "gigabytes"]
PROMPT, REPEATS = 4, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ", ".join(MODELS)
    parser.add_argument("--model", action="append", help=f"a preset (default: {default})")
    parser.add_argument("--context", type=int, action="append", help="tokens so far (default: 1024 to 131072)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="to decode, three times (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default=default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--csv", type=Path, default=Path("decode_length.csv"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.model is None:
        parser.error("no GPU: give --model, such as tiny-hybrid-m2rnn; the 410M models are for a GPU")
    contexts = arguments.context or CONTEXTS
    for name, value in (("batch", arguments.batch), ("tokens", arguments.tokens), ("context", min(contexts))):
        if value < (PROMPT if name == "context" else 1):
            parser.error(f"--{name} {value}: expected at least {PROMPT if name == 'context' else 1}")
    try:
        configs = {name: presets.get(name) for name in arguments.model or MODELS}
    except ValueError as error:
        parser.error(str(error))
    machine = hardware(arguments.device) | versions(["m2rnn", "torch", "transformers", "cuda-core"])
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("tokens per second of all sequences together:")
    print("  ".join(COLUMNS), flush=True)
    rows = []
    for name, config in configs.items():
        torch.manual_seed(0)
        with torch.device(arguments.device):
            model = M2RNNForCausalLM(config).to(getattr(torch, arguments.dtype)).eval()
        for context in contexts:
            row = {"model": name, "context": context, **measure(model, context, arguments)}
            print("  ".join(shown(row[column]).rjust(len(column)) for column in COLUMNS), flush=True)
            rows.append(row | {"batch": arguments.batch, "dtype": arguments.dtype} | machine)
            write_csv(arguments.csv, rows)
        del model
        free(arguments.device)


def measure(model: M2RNNForCausalLM, context: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of one model after so many tokens; None for what the memory does not suffice for."""
    on_gpu = arguments.device == "cuda"
    found: dict[str, Any] = dict.fromkeys(["eager", "graph", "ms_per_token", "cache_megabytes", "gigabytes"])
    for mode in ("eager", "graph") if on_gpu else ("eager",):
        cache = None
        try:
            room = (REPEATS + 1) * arguments.tokens + 4
            cache = filled_cache(model, arguments.batch, context, context + room if mode == "graph" else None)
            call = model.get_compiled_call(None) if mode == "graph" else model
            seconds = seconds_per_token(call, cache, arguments)
            found[mode], found["ms_per_token"] = arguments.batch / seconds, seconds * 1e3
            found["cache_megabytes"] = bytes_of(cache) / 1e6
            found["gigabytes"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        except torch.OutOfMemoryError:
            pass
        del cache
        free(arguments.device)
    return found


@torch.no_grad()
def filled_cache(model: M2RNNForCausalLM, batch: int, context: int, length: int | None) -> M2RNNCache:
    """The cache after ``context`` tokens, static if it is to have room for ``length``."""
    layers = model.config.num_hidden_layers
    ids = torch.randint(model.config.vocab_size, (batch, PROMPT), device=model.device)
    before = model(ids, past_key_values=M2RNNCache(layers), logits_to_keep=1).past_key_values
    cache = M2RNNCache(layers, length)
    for new, old in zip(cache.layers, before.layers, strict=True):
        state = old.state
        if isinstance(state, AttentionState):
            shape = batch, context, *state.keys.shape[2:]
            state = AttentionState(*(torch.randn(shape, dtype=x.dtype, device=x.device) for x in state[:2]), None)
        new.write(state)
    cache.steps = context
    return cache


@torch.no_grad()
def seconds_per_token(call: Callable[..., Any], cache: M2RNNCache, arguments: argparse.Namespace) -> float:
    """Median over repeats, after as many tokens that compile, capture and warm up."""
    token = torch.zeros(arguments.batch, 1, dtype=torch.long, device=arguments.device)
    times = []
    for repeat in range(REPEATS + 1):
        if (
            repeat == 1 and arguments.device == "cuda"
        ):  # what filling the cache and an earlier graph took does not count
            torch.cuda.reset_peak_memory_stats()
        began = clock(arguments.device)
        for _ in range(arguments.tokens):
            logits = call(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        times.append((clock(arguments.device) - began) / arguments.tokens)
    return statistics.median(times[1:])


def bytes_of(cache: M2RNNCache) -> int:
    """Of all states, for the tokens so far and the room that a static cache has."""
    return sum(x.nbytes for layer in cache.layers for x in layer.state if x is not None)


def clock(device: str) -> float:
    """Seconds, after all work so far is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
