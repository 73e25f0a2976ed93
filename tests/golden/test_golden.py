"""What users have keeps working: models, token files, runs, commands and calls from the time of an earlier commit.

make.py made them, see there. Logits and losses are as exact as the table of tolerances says, and to the bit where the
processor and the versions are those that made them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import m2rnn
import m2rnn.models
from tests.convert.hybrids import needs_swap
from tests.golden import shared
from tests.golden.shared import DATA, PREPARE, RUNS, log_of, outputs_of, read_json, run_command, tokens_of
from tests.tolerances import assert_close

#: What is not compared any more, to the line of CHANGELOG.md that tells users why; failing tests name their keys.
CHANGED: dict[str, str] = {
    # tests/test_cli.py compares them with those of the two commands, and calls the old spelling.
    f"eval {option}": "`m2rnn eval` is two commands, `eval text` and `eval tasks`; the old spelling works and says so."
    for option in read_json(DATA / "commands.json")["eval"]
}
CHANGED["track --jobs"] = "`m2rnn track --compare` takes as many runs at a time as there are cores, one thread each."
for option in ("--bos", "--no-bos"):
    CHANGED[f"prepare {option}"] = "`m2rnn prepare` begins documents with bos where the tokenizer itself does."
CHANGED |= {
    f"{name} {field}": "Without experts `output_router_logits` is None and `router_aux_loss_coef` 0: TRL asks these."
    for field in ("output_router_logits", "router_aux_loss_coef")
    for name, fields in read_json(DATA / "presets.json").items()
    if "moe" not in fields["mlps"]
}

MODELS = ["dense", "experts", "hybrid", "options", "tracked", pytest.param("swapped", marks=needs_swap)]
BY_THE_CLOCK = ("seconds", "tokens_per_second", "mfu")
RELATIVE = {"loss": 1e-5, "smoothed_loss": 1e-5, "learning_rate": 1e-9, "perplexity": 1e-4}  # others: gradients' norms
SAME_MACHINE = {**shared.machine(), "commit": None} == {**read_json(DATA / "made_by.json"), "commit": None}


def folder_of(model: str) -> Path:
    return DATA / "track" / "finished" / "model" if model == "tracked" else DATA / "models" / model


def load(name: str, folder: Path) -> PreTrainedModel:
    """The model; every weight in the folder must be one of its own, and the other way round."""
    if name == "swapped":
        return m2rnn.load_swapped(folder).eval()
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs and the outputs that are recorded."""
    tensors = load_file(DATA / "outputs" / f"{name}.safetensors")
    inputs = {key.removeprefix("inputs."): value for key, value in tensors.items() if key.startswith("inputs.")}
    return inputs, {key: value for key, value in tensors.items() if not key.startswith("inputs.")}


def assert_unchanged(found: dict[str, str]) -> None:
    """No differences, by their keys in ``CHANGED``, but those that are named there."""
    left = {key: difference for key, difference in found.items() if key not in CHANGED}
    listed = "".join(f"\n  {key!r}: {difference}" for key, difference in left.items())
    assert not left, f"users' code or files do not work as before; if that is meant, name it in CHANGED:{listed}"


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_the_same_logits_losses_and_tokens(name: str) -> None:
    inputs, expected = golden(name)
    assert_outputs(name, outputs_of(load(name, folder_of(name)), inputs), expected)


def assert_outputs(name: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    bits = {}
    for key, value in expected.items():
        if key == "generated":
            assert torch.equal(found[key], value), key
            continue
        assert_close(found[key], value, torch.float32, "output", key)
        if SAME_MACHINE and not torch.equal(found[key], value):
            bits[f"bits of {name}"] = f"{key} is right within the tolerance, but not to the bit"
    assert_unchanged(bits)


@pytest.mark.parametrize("name", PREPARE)
def test_token_files_are_read_as_they_were_written(name: str) -> None:
    folder, expected = DATA / "tokens" / name, load_file(DATA / "outputs" / f"tokens-{name}.safetensors")
    found = tokens_of(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    from m2rnn.data.token_files import TokenDataset  # where docs/data.md has it

    for split in ("train", "valid"):
        data = TokenDataset(folder, split)
        data.verify()
        tokenizer = data.load_tokenizer()
        assert tokenizer.decode(data.document(0)[:-1]) in texts()


def texts() -> list[str]:
    return [json.loads(line)["text"] for line in (DATA / "text.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", PREPARE)
def test_the_same_text_makes_the_same_token_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    run_command(PREPARE[name], tmp_path)
    for file in sorted((DATA / "tokens" / name).glob("*.bin")):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_disturbed_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DATA)
    run = shutil.copytree(DATA / name / "killed", tmp_path / "run")
    run_command(RUNS[name], run)
    assert_same_log(log_of(run / "log.jsonl"), log_of(DATA / name / "log.jsonl"), name)
    results = read_json(run / "results.json")
    if name == "train":
        assert_contains(results, read_json(DATA / "train" / "results.json"))
    else:
        settings = read_json(DATA / "track" / "finished" / "results.json")["settings"]
        assert_contains(results["settings"], settings)
    assert (run / "model" / "config.json").exists()


def assert_same_log(found: list[dict[str, Any]], expected: list[dict[str, Any]], name: str) -> None:
    """What was logged is; a later version may log more."""
    assert len(found) == len(expected)
    bits = {}
    for line, expected_line in zip(found, expected, strict=True):
        for key in BY_THE_CLOCK:
            expected_line.pop(key, None)
        assert_contains(line, expected_line)
        if SAME_MACHINE and {key: line[key] for key in expected_line} != expected_line:
            bits.setdefault(f"bits of {name}", f"step {line['step']} is right within the tolerance, not to the bit")
    assert_unchanged(bits)


def assert_contains(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every entry of ``expected``: floats nearly, all others exactly."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_contains(found[key], value)
        elif isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=RELATIVE.get(key, 1e-4), abs=0), key
        else:
            assert found[key] == value, key


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    finished = DATA / "track" / "finished"
    run = shutil.copytree(finished, tmp_path / "run")
    assert "m2rnn" in run_command(RUNS["track"], run)
    for file in ("log.jsonl", "results.json", "model/model.safetensors"):
        assert (run / file).read_bytes() == (finished / file).read_bytes(), file
    assert not (run / "checkpoints").exists()


def test_every_key_of_a_recipe_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    settings = read_json(DATA / "train" / "results.json")["settings"]
    pairs = [f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in settings.items()]
    assert len(pairs) > 20
    run_command(f"train --dry-run --data tokens/bytes {' '.join(pairs)}", Path())


def test_every_name_is_where_it_was_and_takes_the_same_calls() -> None:
    assert_unchanged(changed_names(read_json(DATA / "api.json")))


def changed_names(recorded: dict[str, dict[str, str] | None]) -> dict[str, str]:
    """What is wrong with today's names, by those recorded."""
    wrong = {}
    for name, signatures in recorded.items():
        for method, old in (signatures or {"": None}).items():
            try:
                found = shared.resolve(name)
                reasons = [] if old is None else shared.refusals(old, shared.signature_of(found, method[1:]))
                difference = "; ".join(reasons)
            except (ImportError, AttributeError) as error:
                difference = str(error)
            if difference:
                wrong[name + method] = difference
    return wrong


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        ("(a, b=1, *, c=None, **more)", ""),
        ("(a, b=1, d=2, *, c=None, e=3, **more)", ""),
        ("(a, b=1, c=None, **more)", ""),
        ("(a, x=1, *, c=None, **more)", "argument 2 was b, now x=1; b=1 is gone"),
        ("(b=1, a=0, *, c=None, **more)", "argument 1 was a, now b=1"),
        ("(a, b=2, *, c=None, **more)", "the default of b was 1, now 2"),
        ("(a, b, *, c=None, **more)", "the default of b was 1, now there is none"),
        ("(a, b=1, *, c=None, d, **more)", "d is new and has no default"),
        ("(a, *, b=1, c=None, **more)", "argument 2 was b"),
        ("(a, b=1, *, c=None)", "more is gone"),
        ("(d, a, b=1, *, c=None, **more)", "d is new"),
    ],
)
def test_a_signature_that_refuses_a_call_is_seen(new: str, reason: str) -> None:
    found = "; ".join(shared.refusals("(a, b=1, *, c=None, **more)", new))
    assert reason in found
    assert bool(reason) == bool(found)


def test_names_that_are_gone_are_seen() -> None:
    wrong = changed_names({"m2rnn.absent": None, "m2rnn.ops.absent.scan": {"": "()"}, "m2rnn.M2RNN": {".absent": "()"}})
    assert list(wrong) == ["m2rnn.absent", "m2rnn.ops.absent.scan", "m2rnn.M2RNN.absent"]


def test_a_changed_weight_and_a_renamed_one_are_seen(tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("dense"), tmp_path / "model")
    inputs, expected = golden("dense")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mixer.decay_gate.dt_bias"
    weights[name][0] += 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="over the output tolerance"):
        assert_outputs("dense", outputs_of(load("dense", folder), inputs), expected)
    weights["model.layers.1.mixer.decay_gate.bias"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="dt_bias"):
        load("dense", folder)


def test_every_option_of_the_command_line_is_there_with_the_same_default() -> None:
    assert_unchanged(changed_options(read_json(DATA / "commands.json"), shared.commands()))


def changed_options(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> dict[str, str]:
    wrong: dict[str, str] = {}
    for command, options in old.items():
        today = new.get(command, {})
        for option, default in options.items():
            if today.get(option) != default:
                wrong[f"{command} {option}"] = f"its default was {default}, now {today.get(option, 'there is none')}"
        for option in today:
            if option not in options and today[option] == "required":
                wrong[f"{command} {option}"] = "it is new and required"
    return wrong


def test_presets_mean_the_same_models() -> None:
    today = shared.presets()
    assert_unchanged(
        {
            f"{name} {field}": f"was {value}, now {today.get(name, {}).get(field)}"
            for name, fields in read_json(DATA / "presets.json").items()
            for field, value in fields.items()
            if json.loads(json.dumps(today.get(name, {}).get(field, "gone"))) != value
        }
    )
