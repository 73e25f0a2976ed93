"""The command line: help that is enough and fast, and no traceback for a user's mistake."""

import ast
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import m2rnn
from m2rnn import cli
from m2rnn.tasks.settings import TrackSettings
from m2rnn.training.train_settings import TrainSettings, recipes
from tests.golden.shared import DATA, commands, read_json

ROOT = Path(__file__).parent.parent
QUICK = [
    "--train-length=4",
    "--steps=2",
    "--batch-size=2",
    "--test-lengths=4,8",
    "--test-sequences=6",
    "--model=hidden_size=8",
    "--device=cpu",
]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["track", *map(str, arguments)])


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "track",
            ["--group", "--mixer", "--compare", "--seeds", "--jobs", "--train-length", "--patience"],
        ),
        ("train", ["--preset", "--data", "--out", "--minutes", "--dry-run", "RECIPE", "KEY=VALUE"]),
        ("train", ["steps=1000, warmup_steps=100", "compile=false", "report_to=[tensorboard]"]),
        ("train", list(recipes())),
        ("train", [field.name for field in fields(TrainSettings)]),
        ("convert", ["source", "destination", "--to", "--mlp-layout", "--max-shard-size", "--force", "--json"]),
        ("presets", ["[name]", "--filter", "--context", "--json"]),
        (
            "prepare",
            ["--out", "--tokenizer", "--valid-fraction", "--field", "--separator", "--on-error", "--processes"],
        ),
        ("eval", ["text", "tasks"]),
        (
            "eval text",
            ["--data", "--context", "--windows", "--stride", "--train-length", "--join", "--segment", "--dtype"],
        ),
        (
            "eval tasks",
            ["--tasks", "--context", "--include-path", "--limit", "--num-fewshot", "--max-length", "--batch", "--json"],
        ),
        ("generate", ["prompt", "--file", "--prompts", "--max-new-tokens", "--temperature", "--seed", "--no-static"]),
        ("bench op", ["--out", "--shapes", "--backends", "--quick", "--no-sweep", "--device"]),
    ],
)
def test_help_names_every_option_and_imports_no_torch(command, options):
    code = """if True:
        import sys
        from m2rnn import cli
        try:
            cli.app([*sys.argv[1:], "--help"])
        finally:
            print("torch" in sys.modules)
    """
    command = [sys.executable, "-c", code, *command.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    for option in options:
        assert option in done.stdout


def test_a_run_prints_its_table_and_running_it_again_prints_the_same(tmp_path):
    first = run("--out", tmp_path, *QUICK)
    assert first.exit_code == 0, first.output
    assert "compiling kernels" in first.stdout
    for length in ("4", "8"):
        assert any(line.split()[:2] == ["m2rnn", length] for line in first.stdout.splitlines())
    again = run("--out", tmp_path, *QUICK)
    assert again.exit_code == 0
    assert again.stdout.partition("\n")[2] in first.stdout  # all but what is learnt
    assert "last quarter" in again.stdout


def test_options_become_settings(tmp_path):
    options = ["--group=Z5", "--inputs=generators", "--mixer=gru", "--no-curriculum", "--seed=3"]
    options += ["--learning-rate=0.01", "--noise=0.5"]
    assert run("--out", tmp_path, *QUICK, *options).exit_code == 0
    settings = json.loads((tmp_path / "settings.json").read_text())
    expected = TrackSettings(
        group="Z5",
        inputs="generators",
        mixer="gru",
        model={"hidden_size": 8},
        train_length=4,
        curriculum=False,
        steps=2,
        batch_size=2,
        learning_rate=0.01,
        noise=0.5,
        seed=3,
        test_lengths=(4, 8),
        test_sequences=6,
    )
    assert settings == expected.as_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group=S9"], "group 'S9'"),
        (["--mixer=lstm"], "mixer 'lstm'"),
        (["--compare=m2rnn,lstm"], "mixer 'lstm'"),
        (["--compare="], "no state-tracking model for mixer ''"),
        (["--compare=m2rnn,m2rnn"], "compare 'm2rnn,m2rnn': expected one or more, each once"),
        (["--seeds=0,one"], "seeds '0,one'"),
        (["--seeds=1,1"], "seeds '1,1'"),
        (["--test-lengths=8,x"], "test_lengths '8,x'"),
        (["--test-lengths=8,4"], "test_lengths '8,4'"),
        (["--test-lengths="], "test_lengths ''"),
        (["--train-length=0"], "train_length 0"),
        (["--train-length=1000000000000000000"], "train_length 1000000000000000000: expected a whole number of at"),
        (["--batch-size=99999999999"], "batch_size 99999999999"),
        (["--learning-rate=1e308"], "learning_rate 1e+308"),
        (["--test-lengths=8,99999999999"], "test_lengths 99999999999"),
        (["--seed=99999999999999999999"], "seed 99999999999999999999"),
        (["--seed=-1"], "seed -1: expected an integer from 0 to 2**63 - 1"),
        (["--seeds=0,-1"], "seed -1: expected an integer from 0 to 2**63 - 1"),
        (["--model=" + 9999 * "["], "model '[[["),
        (["--inputs=some"], "inputs 'some'"),
        (["--model=hidden_size"], "model 'hidden_size'"),
        (["--model=hidden_size=[8"], "model 'hidden_size=[8'"),
        (["--model=no_such_field=1"], "model.no_such_field"),
        (["--device=abacus"], "device 'abacus'"),
        (["--steps=many"], "--steps"),
        (["--out=/dev/null"], "cannot write to /dev/null"),
    ],
)
def test_a_mistake_is_named_without_a_traceback(tmp_path, options, message):
    result = run("--out", tmp_path, *QUICK, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_damaged_checkpoint_is_named_without_a_traceback(tmp_path):
    assert run("--out", tmp_path, *QUICK).exit_code == 0
    (tmp_path / "results.json").unlink()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    (checkpoint / "state.json").unlink()
    result = run("--out", tmp_path, *QUICK)
    assert result.exit_code == 1
    assert "state.json: No such file or directory" in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("options", [[], ["--seeds=0"]])
def test_damaged_results_are_named_and_written_again_once_deleted(tmp_path, options):
    first = run("--out", tmp_path, *QUICK, *options)
    results = (tmp_path / "m2rnn/seed-0" if options else tmp_path) / "results.json"
    results.write_text("{")
    refused = run("--out", tmp_path, *QUICK, *options)
    assert refused.exit_code == 2
    assert f"{results} is damaged" in refused.stderr
    results.unlink()
    again = run("--out", tmp_path, *QUICK, *options)
    assert again.stdout.splitlines()[-5:] == first.stdout.splitlines()[-5:]


@pytest.mark.parametrize(("options", "again"), [([], ""), (["--overwrite"], " without --overwrite")])
def test_ctrl_c_names_the_command_that_goes_on(tmp_path, monkeypatch, options, again):
    def press_ctrl_c(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("m2rnn.tasks.run.train", press_ctrl_c)
    result = run("--out", tmp_path, *QUICK, *options)
    assert result.exit_code == 130
    assert f"interrupted; the same command{again} resumes the run in {tmp_path}" in result.stderr


def test_other_settings_in_the_same_folder_need_overwrite(tmp_path):
    assert run("--out", tmp_path, *QUICK).exit_code == 0
    refused = run("--out", tmp_path, *QUICK, "--seed", 1)
    assert refused.exit_code == 2
    assert "seed = 0, not 1" in refused.stderr
    assert run("--out", tmp_path, *QUICK, "--seed", 1, "--overwrite").exit_code == 0


def presets(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["presets", *map(str, arguments)])


def test_presets_are_listed_by_name_with_their_sizes():
    rows = [line.split() for line in presets("--filter", "hybrid-gdn-m2rnn1").stdout.splitlines()]
    assert [row[0] for row in rows[1:5]] == [
        "hybrid-gdn-m2rnn1-410m",
        "hybrid-gdn-m2rnn1-7b",
        "tiny-hybrid-gdn-m2rnn1",
        "tiny-moe-hybrid-gdn-m2rnn1",
    ]
    assert rows[2][1:] == [
        *("6,923,789,140", "1,261,478,740", "6,615,507,796"),
        *("M", "135,168", "G", "393,216", "15,360", "7.13", "G"),
    ]
    assert "M m2rnn, G gated_deltanet, A attention" in presets("--filter", "hybrid-gdn-m2rnn1").stdout


def test_presets_are_listed_as_json_too():
    listed = json.loads(presets("--filter", "tiny-hybrid", "--json", "--context", 64).stdout)
    assert [row["name"] for row in listed if "gdn" not in row["name"]] == [
        "tiny-hybrid-m2rnn",
        "tiny-hybrid-mamba2",
        "tiny-hybrid-mamba2-m2rnn1",
        "tiny-hybrid-mamba2-m2rnn2",
    ]
    assert listed[0]["context"] == 64
    (one,) = json.loads(presets("--filter", "tiny-moe-rnn", "--json").stdout)
    assert (one["pattern"], one["active"]) == ("RR", 156_928)


def test_one_preset_is_shown_in_detail():
    shown = presets("hybrid-gdn-m2rnn1-7b").stdout
    assert "MGGGAGGG GGGGAGGG GGGGAGGG GGGGAGGG GGGGAGGG" in shown
    assert "34 × 9,459,206 parameters (num_heads 3, key_dim 256, value_dim 512)" in shown
    assert "135,168 numbers a layer of m2rnn" in shown
    with_config = json.loads(presets("tiny-gru", "--json").stdout)
    assert with_config["config"]["mixer_options"] == {"gru": {"num_heads": 6, "head_dim": 16}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "unknown preset 'huge'; known: m2rnn-410m"),
        (["--filter", "huge"], "no preset's name contains 'huge'"),
        (["tiny-gru", "--context", "0"], "context must be at least 1, got 0"),
    ],
)
def test_a_mistake_about_presets_is_named(arguments, message):
    result = presets(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("size", ["410m", "7b"])
def test_the_documentation_shows_the_table(size):
    documented = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    for line in presets("--filter", size).stdout.splitlines():
        assert f"    {line}".rstrip() in documented


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--data", "corpus.txt"], "text"),
        (["--data=corpus.txt"], "text"),
        (["--tasks", "hellaswag"], "tasks"),
        (["--tasks=hellaswag"], "tasks"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_old_spelling_of_eval_works_and_says_so_once(tmp_path, arguments, meant, first):
    given = [*arguments, str(tmp_path)] if first else [str(tmp_path), *arguments]
    old = CliRunner().invoke(cli.app, ["eval", *given, "--batch", "0"])
    new = CliRunner().invoke(cli.app, ["eval", meant, *given, "--batch", "0"])
    note, *rest = old.stderr.splitlines()
    assert note == f"m2rnn: 'm2rnn eval MODEL' has become two commands; this one is now 'm2rnn eval {meant}'"
    assert rest == new.stderr.splitlines()
    assert rest == [
        f"m2rnn: {tmp_path} has no config.json: expected a folder with a Hugging Face model "
        "(config.json and safetensors)"
    ]
    assert (old.exit_code, old.stdout) == (new.exit_code, new.stdout) == (2, "")


def test_every_option_of_the_old_eval_is_one_of_the_new_commands_with_its_default():
    old, new = read_json(DATA / "commands.json")["eval"], commands()
    text, tasks = new["eval text"], new["eval tasks"]
    meant = {"--data": "required", "--tasks": "required", "--context": "'1024'"}  # those that say more than None did
    for option, default in old.items():
        found = {today[option] for today in (text, tasks) if option in today}
        assert meant.get(option, default) in found, option
    assert text["--batch"] == "None"
    assert tasks["--batch"] == "8"


@pytest.mark.parametrize("arguments", [["a"], ["a", "--data", "b", "--tasks", "c"]])
def test_an_old_eval_without_one_of_text_and_tasks_names_both_commands(arguments):
    done = CliRunner().invoke(cli.app, ["eval", *arguments])
    assert done.exit_code == 2
    assert done.stderr == "m2rnn: expected m2rnn eval text MODEL --data …, or m2rnn eval tasks MODEL --tasks …\n"


TORCHLESS = """if True:
    import sys
    from m2rnn import cli
    try:
        cli.app(sys.argv[1:])
    finally:
        print("torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--version", ""),
        ("track --group S9 --out {tmp}/run", "group 'S9': unknown group"),
        ("track --train-length 0 --out {tmp}/run", "train_length 0"),
        ("track --test-lengths 8,x --out {tmp}/run", "test_lengths '8,x'"),
        ("train --preset tiny-m2rnn --data {tmp}/none --out {tmp}/run", "none holds no finished token files"),
        ("train --preset tiny-m2rnn --data {tmp} --out {tmp}/run stepz=1", "did you mean 'steps'?"),
        ("train --preset tiny-m2rnn --data {tmp} --out {tmp}/run --steps 10", "without dashes: steps=10"),
        ("train --data {tmp} --warmup-steps=7", "without dashes: warmup_steps=7"),
        ("train --data {tmp}", "no preset: give it with --preset"),
        ("prepare {tmp}/none.txt --out {tmp}/tokens", "none.txt: no such file or folder"),
        ("eval text {tmp}/none --data {tmp}", "none is no folder"),
        ("eval text {tmp}/run --data {tmp}/text.txt", "did you mean {tmp}/run/model?"),
        ("eval text {tmp}/run/model --data {tmp}/text.txt", "text.txt: no such file or folder"),
        ("eval tasks {tmp}/none --tasks a", "none is no folder"),
        ("generate {tmp}/none", "none is no folder"),
        ("generate {tmp}/run", "did you mean {tmp}/run/model?"),
        ("convert {tmp}/none {tmp}/new", "none cannot be read: expected a folder"),
    ],
)
def test_a_mistake_that_needs_no_imports_is_named_before_them(tmp_path, command, message):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    arguments = [part.format(tmp=tmp_path) for part in command.split()]
    done = subprocess.run([sys.executable, "-c", TORCHLESS, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    if message:
        assert message.format(tmp=tmp_path) in done.stderr
        assert done.stderr.startswith("m2rnn: ")
        assert done.returncode == 2
    else:
        assert done.stdout.splitlines()[0] == f"m2rnn {m2rnn.__version__}"


@pytest.mark.parametrize("command", [[], ["eval"], ["bench"]])
def test_no_line_of_the_list_of_commands_is_cut(command):
    shown = CliRunner().invoke(cli.app, [*command, "--help"]).stdout
    assert "Commands:" in shown
    assert "..." not in shown.partition("Commands:")[2]


def test_generate_says_what_a_model_of_group_elements_is(tmp_path):
    assert run("--out", tmp_path, *QUICK).exit_code == 0
    done = CliRunner().invoke(cli.app, ["generate", str(tmp_path / "model"), "text"])
    assert done.exit_code == 2
    assert "has no tokenizer: m2rnn track trained it on elements of the group S3" in done.stderr


def test_settings_of_another_run_name_overwrite(tmp_path):
    assert run("--out", tmp_path, *QUICK).exit_code == 0
    refused = run("--out", tmp_path, *QUICK, "--seed", 1)
    assert "choose another folder, or start anew with --overwrite" in refused.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "m2rnn/cli").glob("*.py")), ids=lambda path: path.stem)
def test_no_function_of_the_command_line_has_more_than_sixty_lines(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_a_comparison_names_its_subject_first_and_the_next_command_last(tmp_path):
    done = run("--out", tmp_path, *QUICK, "--compare", "m2rnn,gru", "--seeds", "0,1", "--jobs", "1")
    assert done.exit_code == 0, done.output
    first, *_, least, empty, sentence, blank, plot, following = done.stdout.splitlines()
    assert first.startswith(
        "learning S3: after each element, what the product of all so far is. 4 runs, each at most 2"
    )
    assert (least.split()[0], empty, blank) == ("least", "", "")
    assert sentence.startswith("Accuracy over the last quarter of positions, mean of 2 seeds")
    assert plot == f"plot: {tmp_path / 'accuracy-by-length.png'}; results and models beside it"
    assert following.startswith("next: m2rnn track --compare")
