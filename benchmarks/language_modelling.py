"""Language models of one size, trained alike on the same text: which mixer predicts text best?

    python benchmarks/language_modelling.py TEXT --out runs/lm                 # six models, one GPU
    python benchmarks/language_modelling.py data/tokens --steps 900 --seed 0 --seed 1 --model m2rnn --model hybrid-gdn
    python benchmarks/language_modelling.py data/tokens --unseen unseen.jsonl  # perplexity on another text, too
    python benchmarks/language_modelling.py TEXT --device cpu --width 64 --layers 8 --vocab-size 512 --context 64 \\
        --batch-size 4 --steps 20 --beyond 2 --out runs/dry                    # everything, as small as it gets

The models are the first layers of the paper's 410M patterns at another width, with as many heads as that leaves: equal
in layers, width, head and embedding, and within a fraction of a percent in parameters, by the width of the MLP. Equal
too: the tokens and their order, the schedule, the seed. It drives what `m2rnn prepare`, `train` and `eval` do:
perplexity and bits per byte of the validation split, every token predicted once, from half a context at least if there
is one, and the loss by position in long documents, up to a multiple of the training length.

Interrupted, the same command goes on; a model that is done is not trained again, one that failed is tried again.
Writes into --out: results.json, table.md, results.csv, positions.csv, curves.csv, loss.png, positions.png, and a folder
for each model.
"""

import argparse
import gc
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from m2rnn.data.prepare import Settings, prepare
from m2rnn.data.token_files import MANIFEST, TokenDataset
from m2rnn.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
from m2rnn.models import M2RNNConfig, presets
from m2rnn.models.sizes import size_of
from m2rnn.runs.csv_table import write_csv
from m2rnn.runs.display import Display
from m2rnn.runs.folder import LOG, MODEL, RunFolderError, to_json, write_whole_file
from m2rnn.runs.machine import default_device, hardware, versions
from m2rnn.runs.plot import STYLES, save_figure
from m2rnn.training.train import Stopped, train
from m2rnn.training.train_settings import TrainSettings

MODELS = ["m2rnn", "hybrid-m2rnn", "hybrid-gdn", "hybrid-gdn-m2rnn1", "hybrid-mamba2", "transformer"]
REFERENCE = "transformer"  # whose number of parameters the others get
WIDTH_STEP = 8  # of the MLP: matrices of such widths are quick
SMOOTHED = 20  # steps that a point of the training curve averages


def main() -> None:
    arguments = parse()
    torch.set_float32_matmul_precision("high")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with Display(sys.stdout) as display:
        try:
            tokens = token_folder(arguments, display)
            vocab = TokenDataset(tokens).vocab_size
        except (ValueError, RunFolderError) as error:
            sys.exit(str(error))
        results: list[dict[str, Any]] = []
        for seed in arguments.seed or [0]:
            for name in arguments.model or MODELS:
                display.say(f"{name}, seed {seed}")
                try:
                    results.append(run(name, seed, tokens, vocab, arguments, display))
                except (Stopped, KeyboardInterrupt):
                    sys.exit(f"{name}, seed {seed}: interrupted; the same command goes on")
                write(out, results, arguments, tokens)
                print(table(results), flush=True)
    if any(row["failure"] for row in results):
        sys.exit("some models failed or were stopped: the same command goes on")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="text that m2rnn prepare takes, or the folder that it made")
    parser.add_argument("--valid", help="text to validate on; default a hundredth of the documents")
    parser.add_argument("--tokenizer", default="train-bpe", help="of m2rnn prepare (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of train-bpe (default: %(default)s)")
    default = ", ".join(MODELS)
    parser.add_argument("--model", action="append", help=f"a 410M preset without its size (default: {default})")
    parser.add_argument("--seed", type=int, action="append", help="of weights and data; again for more (default: 0)")
    parser.add_argument("--width", type=int, default=512, help="hidden size, of 64s (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="the pattern's first ones (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, help="sequences at once (default: all of a step)")
    parser.add_argument("--steps", type=int, default=900, help="of each model (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="save and stop a model after that time")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--beyond", type=int, default=8, help="contexts of the loss by position (default: %(default)s)")
    parser.add_argument("--unseen", help="text to measure perplexity on, too (benchmarks/unseen_documents.py)")
    parser.add_argument("--joined", action="store_true", help="its documents as one, if there are no long ones")
    parser.add_argument("--device", default=default_device(), choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("runs/language-modelling"))
    arguments = parser.parse_args()
    if arguments.width < 64 or arguments.width % 64:
        parser.error(f"--width {arguments.width}: expected a multiple of 64")
    if arguments.compile is None:
        arguments.compile = arguments.device == "cuda"
    for name in arguments.model or MODELS:
        if f"{name}-410m" not in presets.names():
            known = [preset.removesuffix("-410m") for preset in presets.names() if preset.endswith("-410m")]
            parser.error(f"--model {name}: expected one of {', '.join(known)}")
    return arguments


def token_folder(arguments: argparse.Namespace, display: Display) -> Path:
    """The token files, which are made unless the data is such a folder."""
    data = Path(arguments.data)
    if (data / MANIFEST).is_file():
        return data
    settings = Settings(
        {"train": [arguments.data], "valid": [arguments.valid] if arguments.valid else []},
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        valid_fraction=0.0 if arguments.valid else 0.01,
    )
    folder: Path = arguments.out / "tokens"
    prepare(settings, folder, say=display.say, update=display.update)
    return folder


# ------------------------------------------------------------------------------------------------------- models


def config_of(name: str, width: int, layers: int, vocab_size: int, mlp: int) -> tuple[M2RNNConfig, dict[str, Any]]:
    """The model, and what makes it of the preset."""
    mixers = presets.get(f"{name}-410m").mixers[:layers]
    heads = {
        "m2rnn": {"num_heads": width * 5 // 64},  # 40 at 512: with 42, half of the paper's, no width is a multiple of 8
        "attention": {"num_heads": width // 64},
        "gated_deltanet": {"num_heads": max(1, width // 512)},
        "mamba2": {"num_heads": width // 16, "inner_size": width * 19 // 16},
        "gru": {"num_heads": width * 5 // 64},
        "rnn": {"num_heads": width * 5 // 64},
    }
    overrides = {
        "hidden_size": width,
        "mixers": mixers,
        "mlps": ["swiglu"] * len(mixers),
        "mixer_options": {mixer: heads[mixer] for mixer in dict.fromkeys(mixers)},
        "mlp_options": {"swiglu": {"intermediate_size": mlp}},
    }
    ids = {"vocab_size": vocab_size, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return presets.get(f"{name}-410m", **overrides, **ids), overrides


def equal_in_parameters(name: str, width: int, layers: int, vocab_size: int) -> tuple[M2RNNConfig, dict[str, Any]]:
    """The model with the MLP that brings it closest to the reference."""

    def parameters(name: str, mlp: int) -> int:
        return size_of(config_of(name, width, layers, vocab_size, mlp)[0]).parameters

    wanted = parameters(REFERENCE, width * 43 // 16)  # the paper's ratio, 2752 to 1024
    least, step = parameters(name, WIDTH_STEP), parameters(name, 2 * WIDTH_STEP)
    count = max(1, round(1 + (wanted - least) / (step - least)))
    return config_of(name, width, layers, vocab_size, WIDTH_STEP * count)


def run(
    name: str, seed: int, tokens: Path, vocab_size: int, arguments: argparse.Namespace, display: Display
) -> dict[str, Any]:
    """Train and evaluate one model."""
    config, overrides = equal_in_parameters(name, arguments.width, arguments.layers, vocab_size)
    size = size_of(config, arguments.context)
    row: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "parameters": size.parameters,
        "state": size.state,
        "kv_cache_per_token": size.kv_cache,
        "failure": None,
    }
    settings = TrainSettings(
        preset=f"{name}-410m",
        data=str(tokens),
        model=overrides,
        context=arguments.context,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size or arguments.batch_size,
        steps=arguments.steps,
        warmup_steps=arguments.steps // 10,
        learning_rate=arguments.learning_rate,
        min_learning_rate=0.1,
        seed=seed,
        device=arguments.device,
        compile=arguments.compile,
        checkpoint_every=max(1, arguments.steps // 2),
        report_to=[],
        valid_sequences=0,  # evaluation is what follows
    )
    folder = arguments.out / f"{name}-seed{seed}"
    try:
        torch.compiler.reset()  # another model's layers: there is a limit to how often one function is compiled
        trained = train(settings, folder, minutes=arguments.minutes, display=display)
        row |= {
            "tokens": trained["tokens"],
            "seconds": trained["seconds"],
            "tokens_per_second": trained["tokens_per_second"],
            "mfu": trained["mfu"],
            "train_loss": trained["loss"],
        }
        row |= evaluation(folder, tokens, arguments, display)
    except Stopped as stopped:
        if stopped.interrupted:
            raise
        row["failure"] = f"stopped by --minutes after {stopped.step} steps"
    except Exception as error:  # one model's failure must not cost the others
        row["failure"] = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return row


def evaluation(folder: Path, tokens: Path, arguments: argparse.Namespace, display: Display) -> dict[str, Any]:
    settings = PerplexitySettings(
        contexts=(arguments.context,),
        train_length=arguments.context,
        beyond=arguments.beyond,
        split="valid",
        joined=arguments.joined,
        device=arguments.device,
        segment=None,
    )
    unseen = replace(settings, train_length=None, split=None, joined=False)
    # As in training: weights, decays among them, stay float32.
    precision = torch.autocast("cuda", torch.bfloat16) if arguments.device == "cuda" else nullcontext()
    with precision:
        found = evaluate_perplexity([folder / MODEL], str(tokens), settings, folder / "eval", display=display)
        if arguments.unseen:
            other = evaluate_perplexity(
                [folder / MODEL], arguments.unseen, unseen, folder / "eval-unseen", display=display
            )
    (model,) = found["models"].values()
    whole, positions = model["contexts"][0], model["positions"]
    measured = {
        "loss": whole["loss"],
        "perplexity": whole["perplexity"],
        "bits_per_byte": whole["bits_per_byte"],
        "windows": positions["windows"],
        "multiples": positions["multiples"],
        "buckets": positions["buckets"],
    }
    if arguments.unseen:
        (model,) = other["models"].values()
        measured |= {f"unseen_{name}": model["contexts"][0][name] for name in ("perplexity", "bits_per_byte")}
    return measured


# ------------------------------------------------------------------------------------------------------- results


def write(out: Path, results: list[dict[str, Any]], arguments: argparse.Namespace, tokens: Path) -> None:
    packages = ["m2rnn", "torch", "triton", "transformers", "flash-linear-attention"]
    manifest = TokenDataset(tokens).manifest
    content = {
        "settings": {name: str(x) if isinstance(x, Path) else x for name, x in vars(arguments).items()},
        "tokenizer": manifest["tokenizer"],
        "splits": {
            split: {key: held[key] for key in ("documents", "tokens", "bytes")}
            for split, held in manifest["splits"].items()
        },
        "models": results,
        "hardware": hardware(arguments.device),
        "versions": versions(packages),
    }
    write_whole_file(out / "results.json", to_json(content))
    write_whole_file(out / "table.md", (table(results) + "\n").encode())
    plain = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in results]
    write_csv(out / "results.csv", plain)
    write_csv(
        out / "positions.csv",
        [{"model": row["model"], "seed": row["seed"]} | each for row in results for each in row.get("buckets", [])],
    )
    curves = {(row["model"], row["seed"]): curve(out / f"{row['model']}-seed{row['seed']}") for row in results}
    write_csv(
        out / "curves.csv",
        [
            {"model": name, "seed": seed, "tokens": number, "loss": loss}
            for (name, seed), points in curves.items()
            for number, loss in points
        ],
    )
    write_plots(out, results, curves)


def curve(folder: Path) -> list[tuple[int, float]]:
    """Tokens and training loss, a point for every ``SMOOTHED`` steps."""
    if not (folder / LOG).exists():
        return []
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["loss"] is not None]
    parts = [lines[start : start + SMOOTHED] for start in range(0, len(lines), SMOOTHED)]
    return [(part[-1]["tokens"], float(np.mean([line["loss"] for line in part]))) for part in parts]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a run, and with several seeds one a model, of means and the lowest and highest perplexity."""
    several = len({row["seed"] for row in results if not row["failure"]}) > 1
    return "\n\n".join([runs_table(results), *([seeds_table(results)] if several else [])])


def runs_table(results: list[dict[str, Any]]) -> str:
    """Loss at a multiple is the mean over the positions from one context before it to it."""
    lengths, unseen = lengths_of(results), any("unseen_perplexity" in row for row in results)
    head = ["model", "seed", "parameters", "state", "cache/token", "tokens/s", "perplexity", "bits/byte"]
    lines = [[*head, *(["unseen"] if unseen else []), *(f"loss at {x}×" for x in lengths)]]
    for row in results:
        cells = [row["model"], str(row["seed"])]
        cells += [f"{row[name]:,}" for name in ("parameters", "state", "kv_cache_per_token")]
        if row["failure"]:
            cells += [row["failure"], *("" for _ in range(len(lines[0]) - len(cells) - 1))]
        else:
            cells += [f"{row['tokens_per_second']:,.0f}", f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}"]
            cells += [f"{row['unseen_perplexity']:.3f}"] if unseen else []
            cells += [f"{row['multiples'][x - 1]['loss']:.4f}" for x in lengths]
        lines.append(cells)
    return markdown(lines)


def seeds_table(results: list[dict[str, Any]]) -> str:
    done = [row for row in results if not row["failure"]]
    lengths = lengths_of(done)
    measures = [name for name in ("perplexity", "unseen_perplexity") if any(name in row for row in done)]
    head = ["model", "seeds", *(name.replace("_perplexity", "") for name in measures)]
    lines = [[*head, *(f"loss at {x}×" for x in lengths)]]
    for name in dict.fromkeys(row["model"] for row in done):
        rows = [row for row in done if row["model"] == name]
        cells = [name, " ".join(str(row["seed"]) for row in rows)]
        for measure in measures:
            values = [row[measure] for row in rows]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        cells += [f"{mean(row['multiples'][x - 1]['loss'] for row in rows):.3f}" for x in lengths]
        lines.append(cells)
    return markdown(lines)


def lengths_of(results: list[dict[str, Any]]) -> list[int]:
    """Multiples of the training length that a table shows."""
    measured = [len(row["multiples"]) for row in results if row.get("multiples")]
    return [x for x in (1, 2, 4, 8, 16) if measured and x <= measured[0]]


def markdown(lines: list[list[str]]) -> str:
    head, *rows = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def write_plots(
    out: Path, results: list[dict[str, Any]], curves: dict[tuple[str, int], list[tuple[int, float]]]
) -> None:
    names = dict.fromkeys(row["model"] for row in results)
    colour = {name: colour for name, (colour, _) in zip(names, cycle(STYLES), strict=False)}
    training = [(name, [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points])
                for (name, _), points in curves.items() if points]  # fmt: skip
    plot(out / "loss.png", training, colour, "million tokens", "training loss (nats per token)")
    positions = [
        (row["model"], [each["stop"] for each in row["buckets"]], [each["loss"] for each in row["buckets"]])
        for row in results
        if row.get("buckets")
    ]
    plot(out / "positions.png", positions, colour, "position in the document", "loss (nats per token)", log=True)


def plot(
    path: Path,
    lines: list[tuple[str, list[float], list[float]]],
    colour: dict[str, str],
    x: str,
    y: str,
    log: bool = False,
) -> None:
    """A line a model and seed, in the model's colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    named: set[str] = set()
    for name, xs, ys in lines:
        label, marker = None if name in named else name, "o" if len(xs) == 1 else None
        axes.plot(xs, ys, color=colour[name], label=label, marker=marker, linewidth=1.2)
        named.add(name)
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda place, _: f"{place:,g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if named:
        axes.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
