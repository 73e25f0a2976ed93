"""The tables and plots of a campaign, from the results that benchmarks/campaign.py has left.

    python benchmarks/campaign_report.py PLAN.yaml --out FOLDER

For each stage of the plan that has results, and each of its texts, it writes table-STAGE.md and plots, and prints the
tables. They are a function of the plan and the results alone. Runs that are missing are named. Runs that cannot be
compared, since they saw other texts or another number of tokens, are refused.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from campaign import Result, read_results
from campaign_measure import unpack
from campaign_plan import Plan, PlanError, Run
from campaign_statistics import Interval, far_behind, over_documents, over_seeds, percent_of_perplexity

from m2rnn.runs.folder import write_whole_file

MULTIPLES = (1, 2, 4, 8, 16)  # of the training length
FAR = (8, 16)  # those whose differences are shown
REFERENCE = "hybrid-gdn"
NONE = "–"


@dataclass(frozen=True)
class Comparison:
    """The runs of one stage on one text.

    Attributes:
        name, slug: of the stage, with the text where the stage has several; the slug is for names of files.
        sweep: whether the stage asks for a learning rate.
        runs: all that the plan wants, of each model.
        results: those that there are, of each model, by rate and seed.
        borrowed: models of which only the results of another stage are shown: what the stage's models are like.
    """

    name: str
    slug: str
    sweep: bool
    runs: dict[str, list[Run]]
    results: dict[str, list[Result]]
    borrowed: set[str]

    def healthy(self, model: str) -> list[Result]:
        return [result for result in self.results.get(model, []) if result["failure"] is None]

    @property
    def models(self) -> list[str]:
        """Those with a result."""
        return [model for model in self.runs if self.results[model]]


def main() -> None:
    arguments = parse()
    try:
        plan = Plan(arguments.plan)
        results = read_results([arguments.results])
        found = comparisons(plan, results)
        if arguments.reference is not None and not any(arguments.reference in each.models for each in found):
            raise PlanError(f"--reference {arguments.reference}: no result of this model in {arguments.results}")
        for comparison in found:
            check_alike(comparison)
    except PlanError as error:
        sys.exit(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for comparison in found:
        text = table(comparison, arguments.reference)
        write_whole_file(arguments.out / f"table-{comparison.slug}.md", text.encode())
        print(text)
        if not arguments.no_plots:
            from campaign_plots import draw

            draw(comparison, arguments.out)
    shown = {result["name"] for each in found for same in each.results.values() for result in same}
    if others := sorted(result["name"] for result in results if result["name"] not in shown):
        print(f"In no stage of the plan: {', '.join(others)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="such as benchmarks/plans/language-modelling.yaml")
    results = Path(__file__).parent / "results" / "campaign"
    parser.add_argument("--results", type=Path, default=results, help="a folder (default: this repository's)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for tables and plots")
    parser.add_argument(
        "--reference", help=f"the model that others are compared with (default: {REFERENCE}, else a stage's first)"
    )
    parser.add_argument("--no-plots", action="store_true", help="only the tables")
    return parser.parse_args()


def comparisons(plan: Plan, results: list[Result]) -> list[Comparison]:
    """The stages that have results, each once for each of its texts, in the plan's order."""
    by_name = {result["name"]: result for result in results}
    found = []
    for stage in plan.stages:
        sweep = len(stage["learning_rates"]) > 1
        borrowed = [] if sweep else parents(plan, stage)
        models = [*borrowed, *stage["models"]]
        wanted = runs_of(plan, {**stage, "models": models}, results)
        for text in stage["texts"]:
            runs = {model: [run for run in wanted if (run.model, run.text) == (model, text)] for model in models}
            there = {model: [by_name[run.name] for run in same if run.name in by_name] for model, same in runs.items()}
            for same in there.values():
                same.sort(key=lambda result: (result["settings"]["learning_rate"], result["seed"]))
            name = stage["name"] if len(stage["texts"]) == 1 else f"{stage['name']}, {text}"
            slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
            if any(there[model] for model in stage["models"]):
                found.append(Comparison(name, slug, sweep, runs, there, set(borrowed)))
    return found


def parents(plan: Plan, stage: dict[str, Any]) -> list[str]:
    """What the stage's models are `like`, where it does not train that itself and its learning rate is known."""
    swept = {model for each in plan.stages if each["name"] in stage.get("best_of", ()) for model in each["models"]}
    likes = dict.fromkeys(plan.models[model].get("like") for model in stage["models"])
    return [
        model
        for model in likes
        if model is not None
        and model not in stage["models"]
        and ("best" not in stage["learning_rates"] or plan.models[model].get("tuned_as", model) in swept)
    ]


def runs_of(plan: Plan, stage: dict[str, Any], results: list[Result]) -> list[Run]:
    """All runs of a stage, those too that it shares with an earlier one."""
    alone = copy(plan)
    alone.stages = [stage, *(each for each in plan.stages if each["name"] in stage.get("best_of", ()))]
    return [run for run in alone.runs(results) if run.stage == stage["name"]]


def check_alike(comparison: Comparison) -> None:
    """Refuse runs that saw other texts, or another number of tokens, than the first.

    Raises:
        PlanError: names the run, the setting and both values.
    """
    results = [result for model in comparison.models for result in comparison.results[model]]
    first, *others = results
    expected = compared(first)
    for result in others:
        for name, value in compared(result).items():
            if expected.setdefault(name, value) != value:
                raise PlanError(
                    f"{result['name']}: {name} is {value}, expected {expected[name]} as in {first['name']}: the stage "
                    f"{comparison.name} cannot compare them. Train one of them again, or remove its result"
                )


def compared(result: Result) -> dict[str, Any]:
    """What is equal in all runs of a comparison; a run that failed has fewer of them."""
    settings = result["settings"]
    found = {"steps": result["steps"]} | {name: settings[name] for name in ("context", "batch_size")}
    for split in ("train", "valid"):
        found[f"the hash of the {split} text"] = result["texts"][split]["tokens_sha256"]
    if result["failure"] is None:
        found["the number of training tokens"] = result["training"]["tokens"]
        found["the number of training lengths measured"] = len(result["positions"]["multiples"])
    return found


# ------------------------------------------------------------------------------------------------------------ numbers


def number(value: float | None) -> float:
    """NaN counts as infinite: a state that overflowed is the worst result, not a missing one."""
    return float("inf") if value is None or np.isnan(value) else float(value)


def loss(result: Result) -> float:
    return number(result["valid"]["loss"])


def loss_at(multiple: int) -> Callable[[Result], float | None]:
    """The mean loss of the multiple-th training length; None where it was not measured."""

    def measured(result: Result) -> float | None:
        multiples = result["positions"]["multiples"]
        return number(multiples[multiple - 1]) if multiple <= len(multiples) else None

    return measured


def attention_gain(result: Result) -> float | None:
    """How much the loss rises without attention; None for a model without it, or with nothing else."""
    off = result["attention_off"]
    return None if off is None else number(off) - loss(result)


Measure = tuple[str, Callable[[Result], float | None], str]  # the heading, the number, its format
AT: list[Measure] = [(f"{multiple}×", loss_at(multiple), ".3f") for multiple in MULTIPLES]
QUALITY: list[Measure] = [
    ("loss", loss, ".4f"),
    ("perplexity", lambda result: float(np.exp(loss(result))), ".3f"),
    ("bits per byte", lambda result: result["valid"]["bits_per_byte"], ".4f"),
    ("tokens/s", lambda result: result["training"]["tokens_per_second"], ",.0f"),
    ("parameters", lambda result: result["size"]["parameters"], ",.0f"),
    ("state", lambda result: result["size"]["state"], ",.0f"),
]
RECALL: list[Measure] = [
    ("repeated n-grams", lambda result: result["valid"]["repeated"]["loss"], ".3f"),
    ("other tokens", lambda result: result["valid"]["others"]["loss"], ".3f"),
    ("copying, % right", lambda result: 100 * result["copying"]["accuracy"], ".1f"),
    ("loss added without attention", attention_gain, ".3f"),
]


def middle(values: Iterable[float | None], style: str) -> str:
    """The median, and the range where it shows."""
    there = [value for value in values if value is not None]
    if not there:
        return NONE
    median, least, greatest = (f"{each:{style}}" for each in (np.median(there), min(there), max(there)))
    return median if least == greatest else f"{median} ({least} to {greatest})"


def signed(interval: Interval, digits: int) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in interval)
    return f"{mean} ({low} to {high})"


# ------------------------------------------------------------------------------------------------------------- tables


def table(comparison: Comparison, reference: str | None = None) -> str:
    """All tables of a comparison, in Markdown."""
    parts = rates(comparison) if comparison.sweep else seeds(comparison, reference)
    return "\n\n".join([f"## {comparison.name}", *parts, note(comparison)]) + "\n"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rates(comparison: Comparison) -> list[str]:
    """Validation loss by learning rate, of one seed or the median of several; the best is bold."""
    every = sorted({run.learning_rate or 0.0 for runs in comparison.runs.values() for run in runs})
    rows, warnings = [], []
    for model in comparison.models:
        losses = by_rate(comparison, model)
        best = min(losses, key=lambda rate: losses[rate], default=None)
        failed = {result["settings"]["learning_rate"] for result in comparison.results[model]} - set(losses)
        cells = {rate: f"**{value:.4f}**" if rate == best else f"{value:.4f}" for rate, value in losses.items()}
        cells |= dict.fromkeys(failed, "failed")
        rows.append([model, *(cells.get(rate, NONE) for rate in every)])
        if best in (every[0], every[-1]):
            warnings.append(
                f"Warning: {model} is best at {best:g}, the end of the range: a rate beyond it may be better."
            )
    return [
        "Validation loss (nats per token) by learning rate:",
        markdown(["model", *(f"{rate:g}" for rate in every)], rows),
        *warnings,
    ]


def by_rate(comparison: Comparison, model: str) -> dict[float, float]:
    """The median validation loss of the healthy runs at each learning rate."""
    found: dict[float, list[float]] = {}
    for result in comparison.healthy(model):
        found.setdefault(result["settings"]["learning_rate"], []).append(loss(result))
    return {rate: float(np.median(losses)) for rate, losses in found.items()}


def seeds(comparison: Comparison, reference: str | None) -> list[str]:
    """Medians over seeds, failures, loss by training lengths, recall, and differences from a reference."""
    counted, lengths, recall = [], [], []
    for model in comparison.models:
        done, healthy = comparison.results[model], comparison.healthy(model)
        runs = f"{len(done)} of {len(comparison.runs[model])}"
        behind = sum(far_behind([loss(result) for result in healthy]))
        rate = middle([result["settings"]["learning_rate"] for result in done], "g")
        cells = [runs, str(len(done) - len(healthy)), str(behind), rate]
        counted.append([model, *cells, *row(QUALITY, healthy)])
        recall.append([model, *row(RECALL, healthy)])
        lengths.append([model, middle(map(loss, healthy), ".4f"), *row(AT, healthy)])
        for name in dict.fromkeys(name for result in healthy for name in result["variants"]):
            with_it = [result for result in healthy if name in result["variants"]]
            changed = [result["variants"][name] for result in with_it]
            if name.startswith("cut") and all(
                a["loss"] == b["valid"]["loss"] for a, b in zip(changed, with_it, strict=True)
            ):
                continue  # training had bounded the weights below it
            total = middle((number(each["loss"]) for each in changed), ".4f")
            lengths.append([f"{model}, {name}", total, *row(AT, changed)])
    return [
        "Medians over seeds (range). State: numbers that the recurrent layers keep of a sequence.",
        markdown(["model", "runs", "failed", "far behind", "rate", *(name for name, _, _ in QUALITY)], counted),
        "Loss (nats per token): on all validation documents, and on the long ones by the training length that the "
        "tokens are in. Cuts and windows are made after training.",
        markdown(["model", "validation", *(name for name, _, _ in AT)], lengths),
        "Recall: loss on tokens that follow the same three tokens as earlier in the document, and on others; how much "
        "of the second copy of random tokens the model gets right; what attention contributes.",
        markdown(["model", *(name for name, _, _ in RECALL)], recall),
        *differences(comparison, reference),
    ]


def row(measures: Sequence[Measure], results: Sequence[Result]) -> list[str]:
    return [middle((measure(result) for result in results), style) for _, measure, style in measures]


def differences(comparison: Comparison, reference: str | None) -> list[str]:
    """Each model less the reference: by seed, by document, in perplexity and beyond the training length."""
    models = [model for model in comparison.models if comparison.healthy(model)]
    wanted = next((name for name in (reference, REFERENCE) if name in models), next(iter(models), None))
    rows = []
    for model in models:
        if model == wanted:
            continue
        there = {result["seed"]: result for result in comparison.healthy(model)}
        others = {result["seed"]: result for result in comparison.healthy(str(wanted))}
        pairs = [(there[seed], others[seed]) for seed in sorted(there.keys() & others.keys())]
        if pairs:
            rows.append([model, *difference(pairs)])
    if not rows:
        return []
    headings = ["loss", "by document", "perplexity, %", *(f"loss at {multiple}×" for multiple in FAR)]
    return [
        f"Difference from {wanted}, paired by seed: mean and 95 % interval by Student's t over seeds; by document: a "
        "bootstrap over the documents, of the mean over seeds. One seed has only the interval over documents.",
        markdown(["model", "seeds", *headings], rows),
    ]


def difference(pairs: Sequence[tuple[Result, Result]]) -> list[str]:
    """The cells of one model: its results, each with the reference's of the same seed."""
    by_seed = [loss(a) - loss(b) for a, b in pairs]
    tokens = unpack(pairs[0][0]["valid"]["documents"]["tokens"])
    document = over_documents(mean_of(pairs, lambda result: unpack(result["valid"]["documents"]["loss"])), tokens)
    one = len(pairs) == 1
    total = document if one else over_seeds(by_seed)
    cells = ["one seed, by document" if one else str(len(pairs)), signed(total, 4), signed(document, 4)]
    cells.append(signed(percent_of_perplexity(total), 2))
    for multiple in FAR:
        if loss_at(multiple)(pairs[0][0]) is None:
            cells.append(NONE)
        elif one:
            windows = mean_of(pairs, lambda result, multiple=multiple: of_windows(result, multiple))
            cells.append(signed(over_documents(windows, np.ones(len(windows))), 3))
        else:
            at = loss_at(multiple)
            cells.append(signed(over_seeds([(at(a) or 0.0) - (at(b) or 0.0) for a, b in pairs]), 3))
    return cells


def mean_of(pairs: Sequence[tuple[Result, Result]], losses: Callable[[Result], np.ndarray]) -> np.ndarray:
    """The mean over seeds of what the documents' losses differ by."""
    return np.mean([losses(a) - losses(b) for a, b in pairs], axis=0)


def of_windows(result: Result, multiple: int) -> np.ndarray:
    """The loss of each long document in the multiple-th training length."""
    positions = result["positions"]
    return unpack(positions["documents"]).reshape(positions["windows"], -1)[:, multiple - 1]


def note(comparison: Comparison) -> str:
    """What is missing, and what the runs ran on."""
    results = [result for model in comparison.models for result in comparison.results[model]]
    first = results[0]
    lines = []
    missing = [
        f"{model} ({len(comparison.results[model])} of {len(runs)} runs)"
        for model, runs in comparison.runs.items()
        if len(comparison.results[model]) < len(runs) and model not in comparison.borrowed
    ]
    if missing:
        lines.append(f"Missing: {', '.join(missing)}.")
    if extra := [model for model in comparison.models if model in comparison.borrowed]:
        lines.append(f"From another stage: {', '.join(extra)}.")
    tokens = first["steps"] * first["settings"]["context"] * first["settings"]["batch_size"]
    hashes = ", ".join(f"{split} {held['tokens_sha256'][:12]}" for split, held in sorted(first["texts"].items()))
    lines.append(
        f"{first['text']}: {tokens:,} training tokens a run, {first['texts']['valid']['tokens']:,} of validation; "
        f"SHA-256 of the token files: {hashes}."
    )
    lines.append(f"Hardware: {counts(result['hardware']['gpu'] or result['hardware']['cpu'] for result in results)}.")
    for name in sorted({name for result in results for name in result["versions"]}):
        there = [result["versions"].get(name) for result in results]
        if any(there):
            lines.append(f"{name} {counts(version or 'absent' for version in there)}.")
    return " ".join(lines)


def counts(values: Iterable[str]) -> str:
    """Each value once; with its number of runs, where there are several."""
    found = Counter(values)
    return ", ".join(f"{value} ({count} runs)" if len(found) > 1 else value for value, count in sorted(found.items()))


if __name__ == "__main__":
    main()
