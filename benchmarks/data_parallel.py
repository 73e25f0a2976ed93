"""Training over several GPUs beside one: is the loss the same, how much faster is it, how much memory does it take?

    m2rnn prepare TEXT --tokenizer train-bpe --vocab-size 8192 --out data/bpe8k
    python benchmarks/data_parallel.py --data data/bpe8k                          # one GPU, DDP and FSDP2, two models
    python benchmarks/data_parallel.py --data data/bpe8k --mode one --mode fsdp steps=24 batch_size=8 micro_batch_size=2
    python benchmarks/data_parallel.py --data DATA --device cpu --mode one --mode ddp --preset tiny-hybrid-m2rnn \\
        steps=8 warmup_steps=2 context=64 batch_size=4 micro_batch_size=1         # the same on a laptop

Each run is `m2rnn train`, under torchrun where it takes several processes: the dense 410M hybrid, and the 7B mixture of
experts at half its width with 8 layers; KEY=VALUE goes to all of them. The difference of the loss is the mean over half
of the steps of the distance from the first mode's, in log.jsonl. The speed is the median of all but a first quarter.

Interrupted, the same command goes on. Writes into --out a folder for each run and results.csv.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.folder import LOG, RESULTS
from m2rnn.runs.machine import default_device, hardware, versions

MODELS = {
    "dense": ["preset=hybrid-m2rnn-410m"],
    "mixture": [
        "preset=hybrid-m2rnn-7b",
        "checkpoint_activations=true",
        "model.hidden_size=768",
        "model.mixers=[m2rnn,m2rnn,m2rnn,m2rnn,attention,m2rnn,m2rnn,m2rnn]",
        "model.mlps=[moe,moe,moe,moe,moe,moe,moe,moe]",
        "model.mixer_options.m2rnn.num_heads=66",
        "model.mixer_options.attention.num_heads=12",
    ],
}
MODES = {
    "one": [],
    "one-again": [],
    "ddp": [],
    "fsdp": ["fsdp=true"],
    "fsdp-bfloat16": ["fsdp=true", "fsdp_bfloat16=true"],
}
STEPS = [
    "steps=8",
    "warmup_steps=2",
    "learning_rate=3e-4",
    "context=4096",
    "batch_size=32",
    "micro_batch_size=8",
    "valid_sequences=0",
    "report_to=[]",
]
COLUMNS = {
    "model": "{}", "mode": "{}", "processes": "{}", "first_half": "{:.5f}", "second_half": "{:.5f}",
    "last_loss": "{:.4f}", "tokens_per_second": "{:,.0f}", "ratio": "{:.2f}", "gigabytes": "{:.1f}", "failure": "{}",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=f"of m2rnn train (first: {' '.join(STEPS)})")
    parser.add_argument("--data", required=True, help="the folder that m2rnn prepare made")
    parser.add_argument("--model", action="append", choices=[*MODELS], help="default: both")
    parser.add_argument("--preset", help="another model than those two")
    parser.add_argument("--mode", action="append", choices=[*MODES], help="default: one, ddp, fsdp")
    parser.add_argument("--processes", type=int, default=2, help="of a mode with several (default: %(default)s)")
    parser.add_argument("--device", default=default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("runs/data-parallel"))
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.preset is None:
        parser.error("no GPU: give --preset, such as tiny-hybrid-m2rnn; the 410M model is for a GPU")
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.processes:
        parser.error(f"--processes {arguments.processes}: expected at most {torch.cuda.device_count()}, the GPUs here")
    models = {name: MODELS[name] for name in arguments.model or MODELS}
    if arguments.preset is not None:
        models = {arguments.preset: [f"preset={arguments.preset}"]}
    machine = hardware(arguments.device) | versions(["m2rnn", "torch", "transformers", "accelerate"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        first: list[dict[str, Any]] | None = None
        for mode in arguments.mode or ["one", "ddp", "fsdp"]:
            processes = 1 if mode.startswith("one") else arguments.processes
            settings = [*STEPS, *model, *arguments.settings, *MODES[mode], f"device={arguments.device}"]
            folder = arguments.out / f"{name}-{mode}"
            print(f"{name}, {mode}, {processes} process(es)", flush=True)
            failure = run(settings, arguments.data, folder, processes)
            row = {"model": name, "mode": mode, "processes": processes, "failure": failure}
            if failure is None:
                log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
                first = first or log
                row |= measured(log, first) | {"gigabytes": gigabytes(folder)}
            rows.append(row)
            write_csv(arguments.out / "results.csv", [row | machine for row in rows], [*COLUMNS, *machine])
    print()
    show(rows)


def run(settings: list[str], data: str, folder: Path, processes: int) -> str | None:
    """Train, unless that is done; the last line of the error if it failed."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [*launch, "m2rnn", "train", "--data", data, "--out", str(folder), *settings]
    environment = os.environ if processes > 1 else os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode == 130:
        sys.exit(130)
    if done.returncode == 0:
        return None
    said = [line for line in done.stderr.splitlines() if line.startswith("m2rnn: ")]
    if not said:
        sys.stderr.write(done.stderr)
    return said[0] if said else f"exit status {done.returncode}"


def measured(log: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    distances = [abs(mine["loss"] - other["loss"]) for mine, other in zip(log, first, strict=True)]
    half, warm = len(log) // 2, len(log) // 4
    speed, one = (median(line["tokens_per_second"] for line in lines[warm:]) for lines in (log, first))
    return {
        "first_half": mean(distances[:half] or [0.0]),
        "second_half": mean(distances[half:]),
        "last_loss": log[-1]["loss"],
        "tokens_per_second": speed,
        "ratio": speed / one,
    }


def gigabytes(folder: Path) -> float | None:
    """Of one GPU's memory, at the most."""
    found = json.loads((folder / RESULTS).read_text())["gpu_memory_bytes"]
    return None if found is None else float(found) / 1e9


def show(rows: list[dict[str, Any]]) -> None:
    cells = [
        [*COLUMNS],
        *(["" if row.get(name) is None else text.format(row[name]) for name, text in COLUMNS.items()] for row in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
