"""Settings that cannot work are named before anything is trained; plans and recipes say what will be."""

import zipfile
from pathlib import Path

import pytest
import torch

from m2rnn.data.token_files import TokenDataset
from m2rnn.models import M2RNNForCausalLM
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.machine import memory_of
from m2rnn.training.throughput import Throughput, peak_of
from m2rnn.training.train import build_config, dry_run, train, training_arguments
from m2rnn.training.train_report import check_memory, memory_per_process
from m2rnn.training.train_settings import load_settings, recipes
from tests.training.train_runs import settings_of

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", r"unknown key 'stepz'; did you mean 'steps'\?; known: preset, data, .*steps"),
        ("steps=many", r"steps 'many': expected a whole number"),
        ("steps=2.5", r"steps 2.5: expected a whole number"),
        ("learning_rate=[1]", r"learning_rate \[1\]: expected a number"),
        ("compile=1", r"compile 1: expected true or false"),
        ("learning_rate=-1", r"learning_rate -1.0: expected a number above 0"),
        ("warmup_steps=-1", r"warmup_steps -1: expected a whole number of at least 0"),
        ("precision=float16", r"precision 'float16': expected one of"),
        ("nonsense", r"'nonsense': expected KEY=VALUE"),
        ("steps.x=1", r"key 'steps.x': only model has parts"),
        ("preset=none", r"unknown preset 'none'"),
        (
            "model.hidden_sizes=3",
            r"model.hidden_sizes: expected a field of M2RNNConfig.*; did you mean 'hidden_size'\?",
        ),
        ("model.vocab_size=8", r"model.vocab_size 8: expected at least 256, the token ids"),
        ("model.hidden_size=wide", r"hidden_size.* expected int, got str .*'wide'"),
        ("model.hidden_size=15", r"must divide hidden_size \(15\)"),
        ("report_to=[tensorbord]", r"report_to \['tensorbord'\]: tensorbord is not supported, only .*tensorboard"),
        ("model.hidden_size=-16", r"'hidden_size': -16.*negative dimension -16"),
        ("model.mixer_options.m2rnn.state_clip=-1", r"state_clip is -1 \(int\), expected a positive number or None"),
        ("model.mixer_options.m2rnn.backend=cpp", r"backend is 'cpp', expected one of 'reference', 'cpu'"),
        ("model.mixer_options=8", r"model.mixer_options 8: expected names with options"),
        ("model.mixer_options.m2rnn=8", r"model.mixer_options \{'m2rnn': 8\}: expected names with options"),
        ("fsdp_bfloat16=true precision=float32", r"fsdp_bfloat16 True: expected false with precision float32"),
        ("seed=-1", r"seed -1: expected a whole number of at least 0"),
        ("seed=4294967296", r"seed 4294967296: expected a whole number of .* less than 2\*\*32"),
        ("batch_size=3", r"batch_size 3: expected a multiple of 2"),
        ("keep_checkpoints=1", r"keep_checkpoints 1: expected at least 2"),
        ("valid_sequences=-1", r"valid_sequences -1: expected a whole number of at least 0"),
        ("steps=true", r"steps True: expected a whole number"),
        ("context=1000000000000000000", r"context 1000000000000000000: expected a whole number of at most"),
        ("batch_size=1e308", r"batch_size 1e\+308: expected a number of at most 3e\+38"),
        ("batch_size=1e30", r"batch_size 1000000000000000\d+: expected a whole number of at most 4,294,967,296"),
        ("valid_sequences=1e308", r"valid_sequences 1e\+308: expected a number of at most"),
        ("learning_rate=1e308", r"learning_rate 1e\+308: expected a number of at most"),
        ("weight_decay=-1e300", r"weight_decay -1e\+300: expected a number of at most"),
        ("skip_steps=[1,100000000000]", r"skip_steps 100000000000: expected a whole number of at most"),
        ("steps=1" + 400 * "0", r"steps of more than 40 digits: expected a whole number of at most"),
        ("steps=1" + 9000 * "0", r"'steps=10+': expected KEY=VALUE"),
        ("model=" + 9999 * "[", r"'model=\[+': expected KEY=VALUE"),
        ("model" + 999 * ".a" + "=1", r"key 'model\.a.*: expected at most 16 parts"),
        ("model.hidden_size=" + "9" * 30, r"model .*hidden_size"),
        ("context=1000000", r"context 1,000,000 with micro_batch_size 2: training tiny-hybrid-m2rnn needs about"),
        ("context=4294967296", r"context 4,294,967,296 with micro_batch_size 2: .* needs about inf GiB"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, data, override, message, monkeypatch):
    monkeypatch.setattr("m2rnn.training.train_report.memory_of", lambda device: 2**32)
    with pytest.raises(SettingsError, match=message):
        train(settings_of(data, *override.split()), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"), [(1000, 100, 100), (101, 100, 100), (100, 100, 10), (10, 100, 1), (5, 100, 0)]
)
def test_a_warm_up_that_is_as_long_as_the_run_is_shortened_to_a_tenth(data, steps, warmup, expected):
    settings = settings_of(data, f"steps={steps}", f"warmup_steps={warmup}")
    assert settings.warmup == expected
    assert settings.deciding()["warmup_steps"] == warmup
    assert training_arguments(settings, Path()).warmup_steps == expected
    assert f"in {expected:,} steps" in dry_run(settings)


def test_a_missing_recipe_says_how_settings_are_typed(data):
    with pytest.raises(
        SettingsError,
        match=r"recipe steps: No such .*by name there are 410m, .*laptop.*typed as steps=…, such as steps=10",
    ):
        load_settings(Path("steps"), [], {"data": data})


def test_a_recipe_is_found_by_its_name_and_a_file_of_that_name_is_preferred(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(recipes()) == [path.stem for path in RECIPES]
    assert load_settings(Path("laptop"), [], {"data": data}) == load_settings(RECIPES[-1], [], {"data": data})
    with pytest.raises(SettingsError, match=r"recipe laptob: No such .*; did you mean 'laptop'\?"):
        load_settings(Path("laptob"), [], {"data": data})
    Path("laptop").write_text("preset: tiny-gru")
    assert load_settings(Path("laptop"), [], {"data": data}).preset == "tiny-gru"


def test_the_wheel_has_the_recipes_and_the_types(tmp_path):
    builders = pytest.importorskip("hatchling.builders.wheel", reason="hatchling makes the wheel")
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    names = zipfile.ZipFile(path).namelist()
    for name in ("py.typed", *(f"recipes/{recipe.name}" for recipe in RECIPES)):
        assert f"m2rnn/{name}" in names


def test_numbers_are_numbers_with_and_without_a_dot(data):
    settings = settings_of(data, "learning_rate=1e-3", "epsilon=1.0e-9", "model.rms_norm_eps=1e-4", "weight_decay=1e+2")
    assert (settings.learning_rate, settings.epsilon, settings.weight_decay) == (1e-3, 1e-9, 100.0)
    config = build_config(settings_of(data, "model.rms_norm_eps=1e-4", "model.embedding_range=1"), TokenDataset(data))
    assert (config.rms_norm_eps, config.embedding_range) == (1e-4, 1.0)
    assert build_config(settings_of(data, "model.rms_norm_eps=1"), TokenDataset(data)).rms_norm_eps == 1.0


def test_an_override_changes_one_of_two_parts_that_a_recipe_shares(tmp_path, data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: tiny-m2rnn\nmodel: {mixer_options: {m2rnn: &heads {num_heads: 4}, attention: *heads}}\n")
    settings = load_settings(recipe, ["model.mixer_options.m2rnn.num_heads=8"], {"data": data})
    assert settings.model["mixer_options"] == {"m2rnn": {"num_heads": 8}, "attention": {"num_heads": 4}}


def test_the_planned_memory_of_attention_grows_with_the_context_alone(data):
    def planned(context: int) -> float:
        settings = settings_of(data, "preset=tiny-transformer", f"context={context}")
        return memory_per_process(settings, build_config(settings, TokenDataset(data)), 1, False)["activations"]

    assert planned(512) == pytest.approx(4 * planned(128), rel=0.01)


def test_the_planned_memory_is_of_float32_weights_gradients_and_two_moments(data):
    def planned(processes: int, *overrides: str) -> dict[str, float]:
        settings = settings_of(data, *overrides)
        return memory_per_process(settings, build_config(settings, TokenDataset(data)), processes, False)

    config = build_config(settings_of(data), TokenDataset(data))
    amount = 4 * sum(weight.numel() for weight in M2RNNForCausalLM(config).parameters())
    one = planned(1)
    assert (one["weights"], one["gradients"], one["moments"]) == (amount, amount, 2 * amount)
    assert one["together"] == 4 * amount + one["activations"]
    assert planned(2)["weights"] == amount
    assert planned(2, "fsdp=true")["moments"] == amount
    assert planned(1, "micro_batch_size=4")["activations"] == pytest.approx(2 * one["activations"], rel=0.01)
    assert planned(1, "checkpoint_activations=true")["activations"] < 0.7 * one["activations"]


def test_the_mean_speed_leaves_out_the_first_steps(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("m2rnn.training.throughput.time.monotonic", lambda: clock[0])
    throughput = Throughput(tokens=100, flops=6, peak=1200.0)
    for seconds in (50, 20, 10, 10, 10, 2, 4):  # of a step
        clock[0] += seconds
        throughput.step()
        assert throughput.last == 100 / seconds
    assert throughput.mean == 200 / 6
    assert throughput.utilisation(100.0) == 0.5
    assert Throughput(100, 6, None).utilisation(100.0) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_is_that_of_the_gpu_itself(name, peak):
    assert peak_of(name) == peak


def test_a_recipe_may_begin_with_a_byte_order_mark_but_not_be_in_utf_16(tmp_path, data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\ufeffpreset: tiny-m2rnn\nsteps: 777\n", encoding="utf-8")
    assert load_settings(recipe, [], {"data": data}).steps == 777
    recipe.write_text("preset: tiny-m2rnn\n", encoding="utf-16")
    with pytest.raises(SettingsError, match=r"recipe\.yaml: UTF-16, expected UTF-8: convert the file"):
        load_settings(recipe, [], {"data": data})


def test_a_recipe_that_is_nested_too_deep_is_named(tmp_path, data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: " + 10_000 * "[")
    with pytest.raises(SettingsError, match=r"recipe .*recipe\.yaml is no YAML: it is nested too deep"):
        load_settings(recipe, [], {"data": data})


@pytest.mark.parametrize("option", ["", "checkpoint_activations=true", "compile=true"])
def test_a_run_is_refused_from_the_byte_on_that_its_plan_exceeds(tmp_path, data, monkeypatch, option):
    settings = settings_of(data, *option.split())
    config = build_config(settings, TokenDataset(data))
    planned = memory_per_process(settings, config, 1, False)
    needed = planned["together"] - (planned["activations"] / 2 if settings.compile else 0)
    for processes in (1, 2):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        arguments = (settings, config, 1, False, torch.device("cpu"))
        monkeypatch.setattr("m2rnn.training.train_report.memory_of", lambda device, n=processes: int(n * needed))
        check_memory(*arguments)
        monkeypatch.setattr("m2rnn.training.train_report.memory_of", lambda device, n=processes: int(n * needed) - 1)
        with pytest.raises(SettingsError, match=r"this CPU has 0\.\d\d GiB\. Expected a smaller context"):
            check_memory(*arguments)


def test_the_memory_of_a_machine_is_its_own_or_its_containers(tmp_path, monkeypatch):
    monkeypatch.setattr("m2rnn.runs.machine.CONTAINER_LIMITS", (tmp_path / "limit",))
    own = memory_of("cpu")
    assert own > 2**28
    for text, expected in (("max\n", own), (f"{2**20}\n", 2**20), (f"{2**63}\n", own)):
        (tmp_path / "limit").write_text(text)
        assert memory_of("cpu") == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_make_a_model_a_schedule_and_a_plan(data, recipe):
    settings = load_settings(recipe, ["device=cpu"], {"data": data})
    config = build_config(settings, TokenDataset(data))
    with torch.device("meta"):
        model = M2RNNForCausalLM(config)
    assert settings.steps > settings.warmup_steps > 0
    assert settings.accumulation(1) * settings.micro_batch_size == settings.batch_size
    if recipe.stem in ("410m", "7b"):
        assert 4e6 < settings.batch_size * settings.context < 4.3e6
        assert (settings.steps, settings.warmup_steps, settings.learning_rate) == (25000, 2500, 3e-4)
        assert model.num_parameters() == {"410m": 512_951_624, "7b": 6_948_251_800}[recipe.stem]
        for processes in (8, 32, 64):
            settings.accumulation(processes)
    text = dry_run(settings)
    assert f"{model.num_parameters():,} parameters" in text
    assert "GiB" in text
