"""A campaign: runs are done once, in the plan's order, with the best rates; what a result holds; equal parameters."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from campaign import campaign, next_run, read_results, seconds_of
from campaign_measure import pack, unpack
from campaign_plan import Plan, PlanError

from m2rnn.data.prepare import Settings, prepare
from m2rnn.models.sizes import size_of
from m2rnn.runs.display import Display
from tests.benchmarks.small_plan import MODELS, SHAPES

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "plans" / "language-modelling.yaml"
PLAN = {
    "vocab_size": 256,
    "shapes": SHAPES,
    "models": MODELS,
    "defaults": {"context": 16, "batch_size": 4, "min_learning_rate": 0.1},
    "texts": {"letters": "made up"},
    "stages": [
        {
            "name": "rates",
            "decides": "the rate",
            "texts": ["letters"],
            "models": ["hybrid"],
            "learning_rates": [1e-4, 3e-2],
            "seeds": [0],
            "steps": 20,
            "evaluate": {"beyond": 4, "cuts": [0.5], "windows": [16]},
        },
        {
            "name": "bound",
            "decides": "the bound",
            "texts": ["letters"],
            "models": ["bounded"],
            "learning_rates": ["best"],
            "best_of": ["rates"],
            "seeds": [0, 1],
            "steps": 10,
            "evaluate": {"beyond": 4},
        },
    ],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    documents = [{"text": "".join(chr(97 + (n * i) % 23) for i in range(70 + n))} for n in range(2, 40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    prepare(
        Settings({"train": [str(folder / "text.jsonl")]}, valid_fraction=0.2), folder / "letters/tokens", processes=1
    )
    return folder


def write_plan(folder: Path, **changes) -> Path:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**PLAN, **changes}))
    return path


def run_campaign(folder: Path, texts: Path, *arguments: str) -> str:
    command = [sys.executable, "benchmarks/campaign.py", str(write_plan(folder)), "--device", "cpu"]
    command += ["--texts", str(texts), "--out", str(folder / "out"), "--results", str(folder / "published"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_a_campaign_does_each_run_once_and_takes_the_best_rate(tmp_path, texts):
    first = run_campaign(tmp_path, texts, "--stage", "rates", "--minutes", "5")
    with tarfile.open(tmp_path / "out/results.tar.xz") as archive:
        archive.extractall(tmp_path / "published", filter="data")
    found = {result["settings"]["learning_rate"]: result for result in read_results([tmp_path / "published"])}
    assert sorted(found) == [1e-4, 3e-2]
    assert found[3e-2]["valid"]["loss"] < found[1e-4]["valid"]["loss"] - 0.1
    assert "letters.hybrid.lr0.03" in first

    second = run_campaign(tmp_path, texts, "--minutes", "5")
    results = {result["name"]: result for result in read_results([tmp_path / "out/results"])}
    bounded = [result for result in results.values() if result["model"] == "bounded"]
    assert len(results) == 4
    assert sorted(result["seed"] for result in bounded) == [0, 1]
    assert {result["settings"]["learning_rate"] for result in bounded} == {3e-2}
    assert "lr0.0001" not in second, "it was done already"
    with tarfile.open(tmp_path / "out/results.tar.xz") as archive:
        assert len(archive.getnames()) == 2, "the results of this call"
    for result in bounded:
        assert max(layer["largest_singular_value"] for layer in result["spectra"]) <= 0.9 + 1e-6
    listed = run_campaign(tmp_path, texts, "--list")
    assert listed.splitlines()[1].split()[:4] == ["rates", "2", "2", "0"]
    assert "0.00" in listed.splitlines()[-1]
    assert not list((tmp_path / "out/runs").iterdir()), "checkpoints of finished runs are gone"


def test_a_result_has_the_losses_of_documents_and_positions(tmp_path, texts):
    run_campaign(tmp_path, texts, "--stage", "rates", "--minutes", "5")
    result = read_results([tmp_path / "out/results"])[0]
    counts, losses = (unpack(result["valid"]["documents"][name]) for name in ("tokens", "loss"))
    assert (counts * losses).sum() / counts.sum() == pytest.approx(result["valid"]["loss"], rel=1e-5)
    windows = result["positions"]["windows"]
    by_document = unpack(result["positions"]["documents"]).reshape(windows, 4)
    assert by_document.mean(0) == pytest.approx(result["positions"]["multiples"], rel=1e-5)
    assert set(result["variants"]) == {"cut 0.5", "window 16"}
    cut = result["variants"]["cut 0.5"]
    assert cut["loss"] != result["valid"]["loss"]
    window = result["variants"]["window 16"]["positions"]["multiples"]
    assert window[0] == pytest.approx(result["positions"]["multiples"][0], rel=1e-6), (
        "within the window nothing changes"
    )
    assert window[3] != pytest.approx(result["positions"]["multiples"][3], rel=1e-6)
    assert len(unpack(result["training"]["curve"]["loss"])) == 20


def test_a_run_that_has_begun_comes_first_and_one_that_is_too_long_only_alone(tmp_path, texts):
    class Arguments:
        out, stage = tmp_path, None

    Arguments.texts = texts
    plan = Plan(write_plan(tmp_path))
    runs = plan.runs([])
    first = next_run(plan, [], set(), 1000, set(), Arguments)
    assert first.name == runs[0].name
    needed = seconds_of(runs[0], plan, [], False)
    assert next_run(plan, [], {runs[1].name}, needed - 1, set(), Arguments) is None, "something ran: it does not fit"
    assert next_run(plan, [], set(), needed - 0.001, set(), Arguments) is None or needed > 75
    (tmp_path / "runs" / runs[1].name / "checkpoints").mkdir(parents=True)
    assert next_run(plan, [], set(), 1000, set(), Arguments).name == runs[1].name


def test_compiled_layers_are_dropped_whenever_another_model_comes(tmp_path, texts, monkeypatch):
    """Beyond eight kinds of layers torch.compile would run them uncompiled, in silence."""
    stage = {**PLAN["stages"][0], "models": ["hybrid", "transformer"], "seeds": [0, 1], "learning_rates": [1e-3, 1e-2]}
    plan = Plan(write_plan(tmp_path, stages=[stage]))
    events = []

    def do(run, plan, folder, *_):
        folder.mkdir(parents=True)
        events.append(run.model)
        return {"name": run.name, "model": run.model, "failure": "made up"}

    monkeypatch.setattr("campaign.do", do)
    monkeypatch.setattr(torch.compiler, "reset", lambda: events.append("reset"))
    arguments = SimpleNamespace(out=tmp_path / "out", texts=texts, stage=None, device="cpu")
    campaign(plan, [], time.monotonic() + 1e4, arguments, Display())
    assert events == ["reset", "hybrid", "hybrid", "reset", "transformer", "transformer"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": {"other": ""}}, "texts has 'letters', expected other"),
        ({"models": {**PLAN["models"], "bounded": {"like": "hybrid"}}}, "no stage of rates has it: name one"),
        ({"stages": [{**PLAN["stages"][0], "wrong": 1}]}, "unknown key 'wrong'"),
        ({"stages": [PLAN["stages"][0]] * 2}, "expected different names"),
    ],
)
def test_a_wrong_plan_is_named(tmp_path, change, message):
    with pytest.raises(PlanError, match=message):
        Plan(write_plan(tmp_path, **change)).runs([])


def test_the_models_of_the_published_plan_are_equal_in_parameters():
    plan = Plan(PUBLISHED)
    for shape, description in plan.shapes.items():
        parameters = {
            model: size_of(plan.config(model)).parameters
            for model in plan.models
            if plan._field(model, "shape") == shape
        }
        goal = parameters[description["reference"]]
        for model, count in parameters.items():
            assert count == pytest.approx(goal, rel=0.003), model


def test_packed_numbers_come_back():
    values = np.array([1.5, -2, np.nan, 0])
    np.testing.assert_array_equal(unpack(pack(values)), values)
