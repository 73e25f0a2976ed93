"""How far a model's loss jumps when m2rnn.swap replaces one of its layers, for each start.

Trains a small hybrid of a family on the source of Python's standard library (bytes), then swaps one layer at a time and
measures the loss on files it has not seen. A few minutes on one CPU thread:

    python benchmarks/swap_start.py --family qwen3_5     # a table, and swap_start.csv
"""

import argparse
import copy
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BambaConfig, BambaForCausalLM, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import m2rnn
from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.machine import hardware, versions

R, A = "linear_attention", "full_attention"
SAME = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SAME |= {"intermediate_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LEARNING_RATE = 3e-3


def untrained(family: str) -> PreTrainedModel:
    if family == "bamba":
        mamba = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2, "mamba_chunk_size": 32}
        return BambaForCausalLM(BambaConfig(**SAME, **mamba, attn_layer_indices=[2, 4]))
    delta_net = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16}
    delta_net |= {"linear_value_head_dim": 16, "head_dim": 16, "layer_types": [R, R, A, R, A]}
    return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**SAME, **delta_net))


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes to test on, of different files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    kept = len(files) * 9 // 10

    def read(part: list[Path]) -> Tensor:
        text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in part)), dtype=torch.uint8)
        return text[text < 128].long()

    return read(files[:kept]), read(files[kept:])


def batches(text: Tensor, seed: int, rows: int = 16, length: int = 128) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (rows,), generator=generator)
        yield torch.stack([text[start : start + length] for start in starts])


def train(model: PreTrainedModel, text: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _, tokens in zip(range(steps), batches(text, 1), strict=False):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_5", choices=["qwen3_5", "bamba"])
    parser.add_argument("--steps", type=int, default=300, help="of training before the swaps")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--csv", type=Path, default=Path("swap_start.csv"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    known, unseen = texts()
    model = untrained(arguments.family)
    train(model, known, arguments.steps)
    model.eval()
    tests = [tokens for _, tokens in zip(range(8), batches(unseen, 2), strict=False)]
    calibration = [tokens for _, tokens in zip(range(16), batches(known, 3), strict=False)]

    @torch.no_grad()
    def loss(model: PreTrainedModel) -> float:
        return sum(model(x, labels=x, use_cache=False).loss.item() for x in tests) / len(tests)

    before = loss(model)
    print(f"{arguments.family}: loss {before:.4f} after {arguments.steps} steps")
    print("layer  sizes           start                  loss jumps by   seconds")
    sizes: dict[str, dict[str, Any]] = {
        "of the mixer": {},
        "others": {"num_heads": 8, "key_dim": 32, "value_dim": 16},
    }
    starts: dict[str, dict[str, Any]] = {
        "no calibration": {},
        "ridge": {"calibration": calibration, "steps": 0},
        "50 steps, ridge": {"calibration": calibration, "steps": 50},
        "200 steps, ridge": {"calibration": calibration, "steps": 200},
    }
    machine = hardware("cpu") | versions(["torch", "transformers", "m2rnn"])
    columns = {"family": arguments.family, "training_steps": arguments.steps, "loss": before}
    rows = []
    for layer in arguments.layers:
        for size, options in sizes.items():
            if size == "of the mixer" and model.config.layer_types[layer] == A:
                continue
            for start, fitting in starts.items():
                torch.manual_seed(1)
                changed, began = copy.deepcopy(model), time.perf_counter()
                m2rnn.swap(changed, [layer], **options, **fitting)
                seconds = time.perf_counter() - began
                jump = loss(changed) - before
                print(f"{layer:<7}{size:<16}{start:<23}{jump:+.4f}{seconds:>17.1f}", flush=True)
                found = {"layer": layer, "sizes": size, "start": start, "jump": jump, "seconds": seconds}
                rows.append(columns | found | machine)
    write_csv(arguments.csv, rows)
    print(f"\nwrote {arguments.csv}")


if __name__ == "__main__":
    main()
