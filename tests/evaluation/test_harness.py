"""Scores of local lm-eval tasks are those computed by hand, for any batch; what cannot run says why."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from m2rnn import cli
from m2rnn.data.tokenizers import byte_tokenizer
from tests.evaluation.models import naive_loss, save

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval brings 50 packages: pip install 'm2rnn[eval]' to test with it")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of its dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
LIKELIHOOD = """
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: perplexity}, {metric: acc}]
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATION = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: [STOP], max_gen_toks: 10, do_sample: false}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = ["one", "two three four five", "six?", "a much longer question than all of the others", "x", "yz", "?!"]
CHOICES = ["ab", "c", "def gh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "hybrid", vocab_size=256)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def log_probability(model, question, answer):
    """Of the answer's bytes after the question's."""
    whole, start = list((question + answer).encode()), len(question.encode())
    return -sum(naive_loss(model, whole[: n + 1]) for n in range(start, len(whole)))


@torch.no_grad()
def greedy(model, question, tokens):
    ids = list(question.encode())
    for _ in range(tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-tokens:]


def write_task(folder, name, kind, rest, documents):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, cache=folder / "cache", kind=kind) + rest)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model):
    """A folder of one task of each kind, and what their scores are."""
    folder = tmp_path_factory.mktemp("tasks")
    expected = {}

    answers = [bytes(b for b in greedy(model, question, 1) if b < 128).decode() or "no" for question in QUESTIONS]
    documents = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    write_task(folder, "tiny_likelihood", "loglikelihood", LIKELIHOOD, documents)
    log_probabilities = [log_probability(model, *document.values()) for document in documents]
    expected["tiny_likelihood", "perplexity"] = math.exp(-sum(log_probabilities) / len(log_probabilities))
    hits = [bytes(greedy(model, q, len(a))) == a.encode() for q, a in zip(QUESTIONS, answers, strict=True)]
    assert 0 < sum(hits) < len(hits)
    expected["tiny_likelihood", "acc"] = sum(hits) / len(hits)

    documents = [{"question": q, "choices": CHOICES, "right": n % 3} for n, q in enumerate(QUESTIONS)]
    write_task(folder, "tiny_choice", "multiple_choice", CHOICE, documents)
    table = torch.tensor([[log_probability(model, q, choice) for choice in CHOICES] for q in QUESTIONS])
    right = torch.arange(len(QUESTIONS)) % 3
    expected["tiny_choice", "acc"] = float((table.argmax(1) == right).double().mean())
    by_length = table / torch.tensor([len(choice) for choice in CHOICES])
    expected["tiny_choice", "acc_norm"] = float((by_length.argmax(1) == right).double().mean())

    made = [byte_tokenizer().decode(greedy(model, question, 10), skip_special_tokens=True) for question in QUESTIONS]
    stop = made[0][4]  # the first answer is cut there, and others if they hold it
    cut = [text.split(stop)[0] for text in made]
    documents = [
        {"question": q, "answer": c if n % 2 else c + "!"} for n, (q, c) in enumerate(zip(QUESTIONS, cut, strict=True))
    ]
    documents[0]["answer"] = cut[0]
    write_task(folder, "tiny_generation", "generate_until", GENERATION.replace("STOP", json.dumps(stop)), documents)
    expected["tiny_generation", "exact_match"] = 4 / 7
    return folder, expected


def run(*arguments):
    return CliRunner().invoke(cli.app, ["eval", "tasks", *map(str, arguments), "--device", "cpu"])


def scores(out):
    (model,) = json.loads((out / "results.json").read_text())["models"].values()
    return {(task, row["metric"]): row["value"] for task, found in model["tasks"].items() for row in found["metrics"]}


NAMES = "tiny_likelihood,tiny_choice,tiny_generation"


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_scores_are_those_by_hand_in_any_batch(tmp_path, folder, tasks, batch):
    place, expected = tasks
    done = run(folder, "--tasks", NAMES, "--include-path", place, "--out", tmp_path / "out", "--batch", batch)
    assert done.exit_code == 0, done.output
    found = scores(tmp_path / "out")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-9), key
    lines = [line.split() for line in done.stdout.splitlines()]
    for (task, metric), value in expected.items():
        shown = f"{value:.4f}" if value < 1000 else f"{value:.4g}"
        assert any(line[1:4] == [task, metric, shown] for line in lines)
    samples = (tmp_path / "out" / "tasks" / "hybrid.tiny_choice.samples.jsonl").read_text().splitlines()
    assert len(samples) == len(QUESTIONS)


def test_a_finished_task_is_not_repeated(tmp_path, folder, tasks, monkeypatch):
    options = [folder, "--tasks", NAMES, "--include-path", tasks[0], "--out", tmp_path / "out", "--limit", 3]
    called = []
    real = lm_eval.simple_evaluate

    def count(**arguments):
        called.append(arguments["tasks"])
        if len(called) == 2:
            raise KeyboardInterrupt
        return real(**arguments)

    monkeypatch.setattr(lm_eval, "simple_evaluate", count)
    stopped = run(*options)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    assert run(*options).exit_code == 0
    assert len(called) == 4
    refused = run(*options[:-1], 4)
    assert refused.exit_code == 2
    assert "limit = 3, not 4" in refused.stderr


def test_a_group_of_tasks_is_scored_as_a_whole(tmp_path, folder, tasks):
    place, expected = tasks
    group = "group: tiny\ntask: [tiny_choice, tiny_likelihood]\naggregate_metric_list: [{metric: acc}]\n"
    (place / "_tiny.yaml").write_text(group)
    done = run(folder, "--tasks", "tiny", "--include-path", place, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = scores(tmp_path / "out")
    both = [expected["tiny_choice", "acc"], expected["tiny_likelihood", "acc"]]
    assert found["tiny", "acc"] == pytest.approx(sum(both) / 2)
    assert found["tiny_choice", "acc"] == both[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny_choise", "--include-path", "{tasks}"], "similar: tiny_choice"),
        (["--tasks", "tiny_broken", "--include-path", "{tasks}"], "nowhere.jsonl"),
        (["--tasks", "tiny_choice", "--include-path", "{tasks}/nothing"], "no such folder"),
        (["--tasks", "tiny_choice,tiny_choice"], "expected different names"),
        (["--tasks", "tiny_choice,"], "expected different names"),
        (["--tasks", "tiny_choice", "--data", "x"], "No such option: --data"),
        (["--tasks", "tiny_choice", "--context", "full"], "context 'full': expected whole numbers such as 4096,16384"),
        (["--tasks", "tiny_choice", "--limit", "0"], "limit 0"),
        (["--tasks", "tiny_choice", "--stride", "3"], "No such option: --stride"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, folder, tasks, arguments, message, monkeypatch):
    place, _ = tasks
    broken = TASK.format(
        name="tiny_broken", data=place / "nowhere.jsonl", cache=place / "cache", kind="multiple_choice"
    )
    (place / "tiny_broken.yaml").write_text(broken + CHOICE)
    if "choise" in arguments[1]:  # lm-eval's own index takes many seconds
        from lm_eval import tasks as module

        real = module.TaskManager
        monkeypatch.setattr(module, "TaskManager", lambda **options: real(**options | {"include_defaults": False}))
    done = run(folder, *(a.format(tasks=place) for a in arguments), "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert isinstance(done.exception, SystemExit)


@pytest.mark.slow
def test_a_data_set_out_of_reach_is_named_with_its_task(tmp_path, folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    done = run(folder, "--tasks", "lambada_openai", "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert "task lambada_openai: its data cannot be loaded" in done.stderr
    assert "EleutherAI/lambada_openai" in done.stderr
