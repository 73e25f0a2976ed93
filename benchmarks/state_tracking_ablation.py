"""What the state-tracking preset needs to learn S3: one choice undone at a time, several seeds.

    python benchmarks/state_tracking_ablation.py --seeds 0,1 --jobs 2

Prints a table and writes state_tracking_ablation.csv. Each run trains as ``m2rnn track --group S3`` does, up to
``--steps`` or ``--minutes``, then is tested at 128 and 512 tokens.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.machine import hardware, versions
from m2rnn.tasks.run import score_model
from m2rnn.tasks.settings import TrackSettings
from m2rnn.tasks.training import train


def layer(**options: Any) -> dict[str, Any]:
    return {"model": {"mixer_options": {"m2rnn": options}}}


VARIANTS: dict[str, dict[str, Any]] = {
    "preset": {},
    "conv 4": layer(conv_size=4),
    "SiLU on q, k, v": layer(activation="silu"),
    "conv 4 and SiLU": layer(conv_size=4, activation="silu"),
    "W = identity": layer(weight_init="identity"),
    "4 heads, K = 8, MLP of 128": {
        "model": {
            "hidden_size": 64,
            "mlps": ["swiglu"],
            "mlp_options": {"swiglu": {"intermediate_size": 128}},
            "mixer_options": {"m2rnn": {"num_heads": 4, "num_q_heads": 4, "num_k_heads": 4, "key_dim": 8}},
        }
    },
    "V = 16, 16 heads": layer(value_dim=16, num_heads=16, num_q_heads=16, num_k_heads=16),
    "V = 64, 4 heads, K = 2": layer(value_dim=64, num_heads=4, num_q_heads=4, num_k_heads=4, key_dim=2),
    "one q and one k head": layer(num_q_heads=1, num_k_heads=1),
    "slow forget gate": layer(A_range=[0.0, 16.0], dt_range=[1e-3, 0.1]),
    "no output gate": layer(gate=False),
    "no norm": layer(norm=False),
    "no residual D": layer(residual=False),
    "no state-gradient clip": layer(state_clip=None),
    "embedding 0.02": {"model": {"embedding_range": 0.02}},
    "no curriculum": {"curriculum": False},
}
FIELDS = ["variant", "seed", "outcome", "steps", "length", "loss", "seconds", "last_quarter_128", "last_quarter_512"]


def run(variant: str, seed: int, steps: int, minutes: float, device: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    settings = TrackSettings(seed=seed, steps=steps, device=device, **VARIANTS[variant])
    with tempfile.TemporaryDirectory() as folder:
        trained = train(settings, Path(folder), minutes=minutes)
    accuracy = [score_model(trained.model, settings, length).last_quarter() for length in (128, 512)]
    progress = trained.progress
    values = [variant, seed, trained.outcome, progress.step, progress.length, progress.smoothed_loss, trained.seconds]
    return dict(zip(FIELDS, [*values, *accuracy], strict=True))


def rows(
    seeds: list[int], jobs: int, steps: int, minutes: float, variants: list[str], device: str
) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(run, variant, seed, steps, minutes, device) for variant in variants for seed in seeds]
        for done in as_completed(runs):
            yield done.result()


def table(results: list[dict[str, Any]], variants: list[str]) -> str:
    lines = ["| variant | length reached | steps | accuracy at 128 | at 512 |", "|---|---|---|---|---|"]
    for variant in variants:
        runs = sorted((row for row in results if row["variant"] == variant), key=lambda row: row["seed"])
        lengths = ", ".join(str(row["length"]) for row in runs)
        steps = ", ".join(str(row["steps"]) for row in runs)
        at = [statistics.mean(row[f"last_quarter_{length}"] for row in runs) for length in (128, 512)]
        lines.append(f"| {variant} | {lengths} | {steps} | {at[0]:.1%} | {at[1]:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=4.0, help="most minutes a run trains")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", default=";".join(VARIANTS), help=f"separated by ; of: {'; '.join(VARIANTS)}")
    parser.add_argument("--csv", type=Path, default=Path("state_tracking_ablation.csv"))
    options = parser.parse_args()
    variants = [name for name in VARIANTS if name in options.variants.split(";")]
    machine = hardware(options.device) | versions(("m2rnn", "torch", "numba"))
    results: list[dict[str, Any]] = []
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for row in rows(seeds, options.jobs, options.steps, options.minutes, variants, options.device):
        results.append(row)
        accuracy = f"{row['last_quarter_128']:.1%} at 128, {row['last_quarter_512']:.1%} at 512"
        reached = f"length {row['length']} after {row['steps']} steps"
        print(f"{row['variant']}, seed {row['seed']}: {reached}, {accuracy}", flush=True)
        write_csv(options.csv, [row | machine for row in results])
    print(table(results, variants))


if __name__ == "__main__":
    main()
