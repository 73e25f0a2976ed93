"""The report of a campaign: medians, failures and intervals against hand-computed numbers; what it does not compare."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from campaign import FORMAT
from campaign_measure import pack
from campaign_plan import Plan
from campaign_statistics import far_behind, over_documents, over_seeds, percent_of_perplexity, student_quantile

from tests.benchmarks.small_plan import MODELS, SHAPES

ROOT = Path(__file__).parents[2]
TOKENS = np.array([100, 300])  # of the two validation documents
STAGE = {"texts": ["letters"], "steps": 20}
PLAN = {
    "vocab_size": 256,
    "shapes": SHAPES,
    "models": MODELS,
    "defaults": {"context": 16, "batch_size": 4},
    "texts": {"letters": "made up"},
    "stages": [
        STAGE
        | {"name": "rates", "decides": "", "models": ["hybrid"], "learning_rates": [1e-3, 2e-3, 4e-3], "seeds": [0]},
        STAGE
        | {"name": "bound", "decides": "", "models": ["bounded"], "learning_rates": ["best"], "best_of": ["rates"]}
        | {"seeds": [0]},
        STAGE
        | {"name": "All seeds!", "decides": "", "models": ["transformer", "hybrid"], "learning_rates": [3e-3]}
        | {"seeds": [0, 1, 2, 3, 4]},
    ],
}
RATES = {1e-3: 3.0, 2e-3: 2.5, 4e-3: 2.4}
SEEDS = {"transformer": [2.0, 2.01, 2.02, 2.5, None], "hybrid": [1.9, 1.93, 1.9, 2.46]}  # None: it failed


def result_of(run: Any, loss: float | None) -> dict[str, Any]:
    """What campaign.py would leave: the second document, three times as long, is 0.2 easier."""
    settings = {**run.settings, "learning_rate": run.learning_rate, "seed": run.seed, "steps": run.steps}
    curve = {"steps": pack([10, 20]), "loss": pack([5, 3]), "gradient_norm": pack([1, 1])}
    result = {
        "format": FORMAT,
        **{name: getattr(run, name) for name in ("name", "stage", "text", "model", "seed", "steps")},
        "settings": settings,
        "size": {"parameters": 12_345, "state": 256},
        "texts": {split: {"tokens_sha256": split * 9, "tokens": 400} for split in ("train", "valid")},
        "hardware": {"gpu": None, "cpu": "Abacus"},
        "versions": {"torch": "2.11.0", "triton": None},
        "failure": None,
        "training": {"curve": curve},
    }
    if loss is None:
        return result | {"failure": "loss is nan"}
    result["training"] |= {"tokens": run.tokens, "tokens_per_second": 1e5}
    documents = np.array([loss + 0.15, loss - 0.05])
    positions = {
        "windows": 2,
        "multiples": [loss + n / 100 for n in range(1, 17)],
        "documents": pack(np.add.outer(documents, np.arange(1, 17) / 100).flatten()),
        "buckets": pack(np.full(64, loss)),
    }
    valid = {
        "loss": loss,
        "bits_per_byte": loss / 2,
        "documents": {"tokens": pack(TOKENS), "loss": pack(documents)},
        "repeated": {"loss": loss - 1},
        "others": {"loss": loss + 1},
    }
    variants = {"cut 0.9": loss + 0.1, "cut 2": loss, "window 16": loss}
    return result | {
        "valid": valid,
        "positions": positions,
        "copying": {"accuracy": 0.25},
        "attention_off": loss + 0.7 if run.model == "hybrid" else None,
        "variants": {name: {"loss": value, "positions": positions} for name, value in variants.items()},
    }


@pytest.fixture
def campaign(tmp_path) -> Path:
    """A plan and results of its stages: of one run, hybrid's fifth seed, there is none."""
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    (tmp_path / "results").mkdir()
    plan, results = Plan(tmp_path / "plan.yaml"), []
    for _ in range(2):  # a rate of `best` is known after the first time
        done = {result["name"] for result in results}
        for run in plan.runs(results):
            losses = SEEDS.get(run.model, [2.6])
            if run.stage == "rates":
                loss = RATES[run.learning_rate]
            elif run.seed < len(losses):
                loss = losses[run.seed]
            else:
                continue
            if run.learning_rate is not None and run.name not in done:
                results.append(result_of(run, loss))
    for result in results:
        save(tmp_path, result)
    return tmp_path


def save(folder: Path, result: dict[str, Any]) -> None:
    (folder / "results" / f"{result['name']}.json").write_text(json.dumps(result))


def change(folder: Path, model: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """A result of the last stage, to spoil."""
    [path] = (folder / "results").glob(f"*.{model}.lr0.003.*seed{seed}.*")
    return path, json.loads(path.read_text())


def report(folder: Path, *arguments: str, code: int = 0) -> str:
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "benchmarks/campaign_report.py",
        str(folder / "plan.yaml"),
    ]
    command += ["--results", str(folder / "results"), "--out", str(folder / "out"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr


def rows(text: str, first: str) -> list[list[str]]:
    """The cells of the table rows that begin with ``first``."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [line[1:] for line in cells if line[0] == first]


@pytest.mark.parametrize(
    ("degrees", "tabulated"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)]
)
def test_student_quantiles_are_the_tabulated_ones(degrees, tabulated):
    assert student_quantile(degrees) == pytest.approx(tabulated, abs=1e-4)


def test_an_interval_over_seeds_is_the_hand_computed_one():
    # The mean of 1, 2, 3 is 2, their deviation 1: 4.3027 / √3 on either side.
    assert over_seeds([1, 2, 3]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    with pytest.raises(ValueError, match="1 seeds: expected 2 or more"):
        over_seeds([0.1])
    with pytest.raises(ValueError, match="degrees=0"):
        student_quantile(0)


def test_a_difference_of_loss_is_a_percentage_of_perplexity():
    assert percent_of_perplexity((0.1, 0.0, -0.1)) == pytest.approx((10.5171, 0, -9.5163), abs=1e-4)


def test_an_interval_over_documents_weighs_them_by_their_tokens():
    mean, low, high = over_documents(np.array([0.4, 0.0]), np.array([1, 3]))
    assert mean == pytest.approx(0.1)
    assert (low, high) == (0.0, 0.4), "a quarter of the resamples have one document alone"
    drawn = np.random.default_rng(7).normal(0.5, 1, 400)
    mean, low, high = over_documents(drawn, np.ones(400))
    assert high - low == pytest.approx(2 * 1.96 * drawn.std() / 20, rel=0.05), "the normal approximation"
    assert over_documents(drawn, np.ones(400)) == (mean, low, high), "the same each time"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], []),
        ([2.0], [False]),
        ([2.0, 3.0], [False, False]),
        ([2.0, 2.01, 2.02, 2.5], [False, False, False, True]),
        ([2.0, 2.001, 2.002, 2.03], [False] * 4),  # many deviations, but 0.0285 nats
        ([2.0, 2.1, 2.2, 2.3, 2.4], [False] * 5),  # far in nats, but the others are as far apart
        ([2.0, 2.01, 2.02, 1.5], [False] * 4),  # far ahead
    ],
)
def test_far_behind_needs_both_nats_and_deviations(losses, expected):
    assert far_behind(losses) == expected


def test_the_best_rate_is_bold_and_one_at_the_end_of_the_range_is_warned_of(campaign):
    report(campaign, "--no-plots")
    text = (campaign / "out/table-rates.md").read_text()
    assert rows(text, "model") == [["0.001", "0.002", "0.004"]]
    assert rows(text, "hybrid") == [["3.0000", "2.5000", "**2.4000**"]]
    assert "Warning: hybrid is best at 0.004, the end of the range" in text


def test_seeds_have_medians_ranges_failures_and_what_is_missing(campaign):
    report(campaign, "--no-plots")
    text = (campaign / "out/table-all-seeds.md").read_text()
    counted, lengths, recall = rows(text, "transformer")[:3]
    assert counted[:5] == ["5 of 5", "1", "1", "0.003", "2.0150 (2.0000 to 2.5000)"]
    assert counted[5] == f"{np.exp([2.0, 2.01, 2.02, 2.5])[1:3].mean():.3f} (7.389 to 12.182)"
    assert counted[-3:] == ["100,000", "12,345", "256"]
    assert lengths[1] == "2.025 (2.010 to 2.510)"
    assert lengths[-1] == "2.175 (2.160 to 2.660)"
    assert recall == ["1.015 (1.000 to 1.500)", "3.015 (3.000 to 3.500)", "25.0", "–"]
    counted, _, recall = rows(text, "hybrid")[:3]
    assert counted[:3] == ["4 of 5", "0", "1"]
    assert recall[-1] == "0.700"
    assert rows(text, "hybrid, cut 0.9")[0][0] == "2.0150 (2.0000 to 2.5600)"
    assert rows(text, "hybrid, window 16")
    assert not rows(text, "hybrid, cut 2"), "it cut nothing"
    assert "Missing: hybrid (4 of 5 runs)." in text
    assert "1,280 training tokens a run, 400 of validation" in text
    assert "Hardware: Abacus. torch 2.11.0." in text


def test_differences_are_paired_by_seed(campaign):
    report(campaign, "--no-plots")
    [row] = [row for row in rows((campaign / "out/table-all-seeds.md").read_text(), "hybrid") if len(row) == 6][-1:]
    # -0.10, -0.08, -0.12 and -0.04: mean -0.085, deviation 0.034157, and 3.1824 / √4 times that on either side.
    assert row[:2] == ["4", "-0.0850 (-0.1394 to -0.0306)"]
    assert row[2] == "-0.0850 (-0.0850 to -0.0850)", "no document differs more than another"
    assert row[3] == "-8.15 (-13.01 to -3.02)"
    assert row[4:] == ["-0.085 (-0.139 to -0.031)"] * 2
    report(campaign, "--no-plots", "--reference", "hybrid")
    text = (campaign / "out/table-all-seeds.md").read_text()
    assert rows(text, "transformer")[-1][1] == "+0.0850 (+0.0306 to +0.1394)"


def test_one_seed_is_compared_by_document_with_the_model_that_it_is_like(campaign):
    report(campaign, "--no-plots")
    text = (campaign / "out/table-bound.md").read_text()
    row = rows(text, "bounded")[-1]
    assert row[:2] == ["one seed, by document", "+0.2000 (+0.2000 to +0.2000)"]
    assert "From another stage: hybrid." in text


def test_two_reports_have_the_same_bytes_and_all_plots(campaign):
    first = report(campaign)
    tables = {path.name: path.read_bytes() for path in (campaign / "out").glob("*.md")}
    assert sorted(tables) == ["table-all-seeds.md", "table-bound.md", "table-rates.md"]
    kinds = ("perplexity", "positions", "trade-off", "training")
    wanted = ["rates-rates.png", *(f"{kind}-{slug}.png" for kind in kinds for slug in ("all-seeds", "bound"))]
    assert sorted(path.name for path in (campaign / "out").glob("*.png")) == sorted(wanted)
    assert report(campaign, "--no-plots") == first
    assert {path.name: path.read_bytes() for path in (campaign / "out").glob("*.md")} == tables


@pytest.mark.parametrize("name", ["steps", "tokens", "hash"])
def test_runs_that_cannot_be_compared_are_refused_by_name(campaign, name):
    path, result = change(campaign, "hybrid", 1)
    if name == "steps":
        result["steps"] = 21
    elif name == "tokens":
        result["training"]["tokens"] = 99
    else:
        result["texts"]["valid"]["tokens_sha256"] = "another"
    path.write_text(json.dumps(result))
    message = report(campaign, code=1)
    expected = {"steps": "steps is 21", "tokens": "training tokens is 99", "hash": "the valid text is another"}
    assert result["name"] in message
    assert expected[name] in message
    assert not (campaign / "out").exists()


def test_results_of_another_format_and_unknown_references_are_refused(campaign):
    assert "--reference gru: no result of this model" in report(campaign, "--reference", "gru", code=1)
    path, result = change(campaign, "hybrid", 1)
    path.write_text(json.dumps(result | {"format": "another"}))
    assert f"expected a result of the format '{FORMAT}'" in report(campaign, code=1)


def test_a_loss_that_overflowed_is_the_worst_one(campaign):
    path, result = change(campaign, "hybrid", 1)
    result["positions"]["multiples"][15] = float("nan")
    path.write_text(json.dumps(result))
    report(campaign, "--no-plots")
    text = (campaign / "out/table-all-seeds.md").read_text()
    assert rows(text, "hybrid")[1][-1] == "2.340 (2.060 to inf)", "between 2.06 and 2.62, with infinity above"
