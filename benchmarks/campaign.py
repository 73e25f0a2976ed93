"""A campaign of language models that any spare minute of a GPU serves.

    python benchmarks/campaign.py PLAN.yaml --list                           # what is done, the GPU hours left
    python benchmarks/campaign.py PLAN.yaml --minutes 8 --out runs/campaign  # the next runs that fit into 8 minutes

A run trains a model as `m2rnn train` does and measures it: loss on unseen documents, by document and by position up to
16 times the training length, what it recalls, what its states and weights became. Its result is one JSON file. A run
that has a result, in --out or in --results, is not done again. One that takes longer than the time goes on from its
checkpoint when the same command comes again. At the end --out holds results.tar.xz, the results of this call, to unpack
in --results; benchmarks/campaign_report.py makes tables and plots of them.

The texts are folders of token files: TEXTS/<name>/tokens, which benchmarks/texts/ makes.
"""

import argparse
import json
import shutil
import sys
import tarfile
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from campaign_measure import evaluate, pack
from campaign_plan import PRESET, Plan, PlanError, Run

from m2rnn.data.token_files import TokenDataset
from m2rnn.models.sizes import size_of
from m2rnn.ops.linear_scan import fla
from m2rnn.runs.display import Display
from m2rnn.runs.folder import LOG, MODEL, to_json, write_whole_file
from m2rnn.runs.machine import default_device, hardware, versions
from m2rnn.training.monitor import NonFiniteError
from m2rnn.training.train import Stopped, train
from m2rnn.training.train_settings import TrainSettings

FORMAT = "m2rnn campaign 1"
PACKAGES = ("m2rnn", "torch", "triton", "transformers", "flash-linear-attention")
TOKENS_PER_SECOND = 5e5 * 34e6  # times parameters: a guess until there is a result
FIRST_SECONDS, OTHER_SECONDS = 75, 40  # to compile and to evaluate: a model's first run of a call, and others
ARCHIVE = "results.tar.xz"
CURVE_POINTS = 100

Result = dict[str, Any]


def main() -> None:
    arguments = parse()
    began = time.monotonic()
    try:
        plan = Plan(arguments.plan)
        results = read_results([arguments.results, arguments.out / "results"])
        if arguments.list:
            print(listing(plan, results))
            return
        with Display(sys.stdout) as display:
            done = campaign(plan, results, began + 60 * arguments.minutes, arguments, display)
    except PlanError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: what is done is kept, and the same command goes on")
    print(summary(done))
    print(
        f"\n{len(done)} results: {arguments.out / ARCHIVE}, to unpack in {arguments.results}. The same command goes on."
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="such as benchmarks/plans/language-modelling.yaml")
    parser.add_argument("--list", action="store_true", help="print the plan and what is left of it")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing that takes longer (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"), help="default: %(default)s")
    parser.add_argument("--texts", type=Path, default=Path("runs/texts"), help="default: %(default)s")
    parser.add_argument("--stage", action="append", help="only this one; again for more")
    parser.add_argument("--device", default=default_device(), choices=["cpu", "cuda"])
    results = Path(__file__).parent / "results" / "campaign"
    parser.add_argument("--results", type=Path, default=results, help="results of before (default: this repository's)")
    return parser.parse_args()


def read_results(folders: Iterable[Path]) -> list[Result]:
    """The results in the folders, each once."""
    found: dict[str, Result] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result.get("format") != FORMAT:
                raise PlanError(f"{path}: expected a result of the format {FORMAT!r}")
            found[result["name"]] = result
    return list(found.values())


def campaign(
    plan: Plan, results: list[Result], deadline: float, arguments: argparse.Namespace, display: Display
) -> list[Result]:
    """Do the next runs until the deadline; return their results."""
    torch.set_float32_matmul_precision("high")
    out: Path = arguments.out
    (out / "results").mkdir(parents=True, exist_ok=True)
    done: list[Result] = []
    seen: set[str] = set()  # models whose kernels the caches on disk have
    compiled = ""
    tried: set[str] = set()
    for model, reason in slow_models(plan, arguments.device).items():
        print(f"{model} is left out: {reason}", file=sys.stderr)
        tried |= {run.name for run in plan.runs(results) if run.model == model}
    while run := next_run(plan, [*results, *done], tried, deadline - time.monotonic(), seen, arguments):
        tried.add(run.name)
        if run.model != compiled:  # beyond a number of models the compiler would give up, and run layers as they are
            torch.compiler.reset()
            compiled = run.model
        display.say(f"{run.stage}: {run.name}")
        try:
            result = do(run, plan, out / "runs" / run.name, deadline, arguments, display)
        except Stopped as stopped:
            if stopped.interrupted:
                raise KeyboardInterrupt from None
            display.say(f"{run.name}: {stopped.step} of {run.steps} steps are saved; the same command goes on")
            break
        except PlanError:
            raise
        except Exception:  # one run's mistake must not cost the others their time; it has no result and comes again
            traceback.print_exc()
            continue
        seen.add(run.model)
        done.append(result)
        write_whole_file(out / "results" / f"{run.name}.json", to_json(result))
        write_archive(out, done)
        shutil.rmtree(out / "runs" / run.name)
        print(line(result), flush=True)
    write_archive(out, done)
    return done


def slow_models(plan: Plan, device: str) -> dict[str, str]:
    """Models whose own fast kernels cannot train on this GPU, and why: a baseline is not run without them."""
    found = {}
    for model in plan.models if device == "cuda" else ():
        config = plan.config(model)
        for mixer, delta in (("gated_deltanet", True), ("mamba2", False)):
            if mixer in config.mixers:
                width = config.mixer_options[mixer].get("key_dim" if delta else "state_size", 0)
                reason = fla.why_not(torch.device(device), torch.bfloat16, width, trained=True, delta=delta)
                if reason is not None:
                    found[model] = reason
    return found


def next_run(
    plan: Plan,
    results: list[Result],
    tried: set[str],
    seconds: float,
    seen: set[str],
    arguments: argparse.Namespace,
) -> Run | None:
    """One that has begun; else the first that fits; else, if nothing ran yet, the first, to go on another time."""
    finished = {result["name"] for result in results} | tried
    open_runs = [
        run
        for run in plan.runs(results)
        if run.learning_rate is not None
        and run.name not in finished
        and (arguments.stage is None or run.stage in arguments.stage)
        and (arguments.texts / run.text / "tokens").is_dir()
    ]
    begun = [run for run in open_runs if (arguments.out / "runs" / run.name / "checkpoints").is_dir()]
    fitting = [run for run in open_runs if seconds_of(run, plan, results, run.model in seen) <= seconds]
    long = open_runs if not tried and seconds > FIRST_SECONDS else []
    return next(iter([*begun, *fitting, *long]), None)


def seconds_of(run: Run, plan: Plan, results: Iterable[Mapping[str, Any]], seen: bool) -> float:
    """How long a run takes, from earlier ones of its model, or of its size."""
    speeds = [
        result["training"]["tokens_per_second"]
        for result in results
        if result["model"] == run.model and result["failure"] is None
    ]
    speed = median(speeds) if speeds else TOKENS_PER_SECOND / size_of(plan.config(run.model)).parameters
    return run.tokens / speed + (OTHER_SECONDS if seen else FIRST_SECONDS)


def do(run: Run, plan: Plan, folder: Path, deadline: float, arguments: argparse.Namespace, display: Display) -> Result:
    """Train and measure one model."""
    tokens = arguments.texts / run.text / "tokens"
    data = TokenDataset(tokens)
    if data.vocab_size != plan.vocab_size:
        raise PlanError(f"{tokens}: {data.vocab_size:,} token ids, expected the plan's {plan.vocab_size:,}")
    on_gpu = arguments.device == "cuda"
    settings = TrainSettings(
        preset=PRESET,
        data=str(tokens),
        model=run.overrides,
        steps=run.steps,
        learning_rate=run.learning_rate or 0.0,
        seed=run.seed,
        device=arguments.device,
        compile=on_gpu,
        report_to=[],
        valid_sequences=0,  # measured afterwards
        checkpoint_every=run.steps,
        **{"micro_batch_size": run.settings["batch_size"], "warmup_steps": run.steps // 10, **run.settings},
    )
    size = size_of(plan.config(run.model), settings.context)
    result: Result = {
        "format": FORMAT,
        "name": run.name,
        "stage": run.stage,
        "text": run.text,
        "model": run.model,
        "seed": run.seed,
        "steps": run.steps,
        "settings": settings.as_json() | {"data": run.text},
        "size": {name: getattr(size, name) for name in ("parameters", "state", "kv_cache", "training_flops")},
        "texts": {
            split: {name: held[name] for name in ("tokens_sha256", "documents", "tokens", "bytes")}
            for split, held in data.manifest["splits"].items()
        },
        "hardware": hardware(arguments.device),
        "versions": versions(PACKAGES),
        "failure": None,
    }
    try:
        trained = train(settings, folder, minutes=(deadline - time.monotonic()) / 60, display=display)
    except NonFiniteError as error:
        return result | {"failure": str(error).partition(". ")[0], "training": {"curve": curve(folder)}}
    names = ("tokens", "seconds", "tokens_per_second", "mfu", "loss", "spikes", "gpu_memory_bytes")
    result["training"] = {name: trained[name] for name in names} | {"curve": curve(folder)}
    display.say(f"{run.name}: measuring")
    return result | evaluate(folder / MODEL, tokens, settings, run.evaluate, arguments.device)


def curve(folder: Path) -> dict[str, str]:
    """Loss and gradient norm, each point the mean of some steps, and how many."""
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    width = max(1, len(lines) // CURVE_POINTS)
    parts = [lines[start : start + width] for start in range(0, len(lines), width)]

    def means(name: str) -> list[float]:
        found = [[line[name] for line in part if line[name] is not None] for part in parts]
        return [sum(values) / len(values) if values else float("nan") for values in found]

    return {
        "steps": pack([part[-1]["step"] for part in parts]),
        "loss": pack(means("loss")),
        "gradient_norm": pack(means("gradient_norm")),
    }


def write_archive(out: Path, results: list[Result]) -> None:
    partial = out / (ARCHIVE + ".partial")
    with tarfile.open(partial, "w:xz") as archive:
        for result in results:
            archive.add(out / "results" / f"{result['name']}.json", f"{result['name']}.json")
    partial.replace(out / ARCHIVE)


# ------------------------------------------------------------------------------------------------------ what is shown


def listing(plan: Plan, results: list[Result]) -> str:
    """The stages in their order: runs, done, failed, waiting, and hours of a GPU that are left."""
    finished = {result["name"]: result for result in results}
    lines = [f"{'stage':<22}{'runs':>6}{'done':>6}{'failed':>8}{'waiting':>9}{'hours left':>12}  decides"]
    total = 0.0
    for stage in plan.stages:
        runs = [run for run in plan.runs(results) if run.stage == stage["name"]]
        done = [finished[run.name] for run in runs if run.name in finished]
        left = [run for run in runs if run.name not in finished]
        hours = sum(seconds_of(run, plan, results, True) for run in left) / 3600
        failed = sum(result["failure"] is not None for result in done)
        waiting = sum(run.learning_rate is None for run in left)
        total += hours
        lines.append(
            f"{stage['name']:<22}{len(runs):>6}{len(done):>6}{failed:>8}{waiting:>9}{hours:>12.2f}  {stage['decides']}"
        )
    return "\n".join([*lines, f"{'':<22}{'':>29}{total:>12.2f}"])


def summary(results: list[Result]) -> str:
    return "\n".join(["", *map(line, results)]) if results else "no run fitted into the time"


def line(result: Result) -> str:
    """One run: loss, and loss by multiples of the training length."""
    if result["failure"] is not None:
        return f"{result['name']}: failed: {result['failure']}"
    multiples = result["positions"]["multiples"]
    by = ", ".join(f"{x}x {multiples[x - 1]:.3f}" for x in (1, 2, 4, 8, 16) if x <= len(multiples))
    speed = result["training"]["tokens_per_second"]
    return f"{result['name']}: loss {result['valid']['loss']:.4f}, {by}; {speed:,.0f} tokens/s"


if __name__ == "__main__":
    main()
