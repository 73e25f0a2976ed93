"""Make what the golden tests read: files and numbers as the library of commit 94d239c gave them.

    git worktree add ../golden-tree 94d239c
    PYTHONPATH=../golden-tree python tests/golden/make.py
    git worktree remove ../golden-tree

It refuses to run with any other commit's library, and to write over data/ without --overwrite. The data stand for what
users have on their disks and in their scripts, so they are never made anew to let a test pass. Under data/:

    made_by.json     the versions and the processor that gave the numbers
    api.json         names that the documents give, and the signatures behind them
    commands.json    options of the command line, with their defaults;  presets.json: the presets' configurations
    models/          by save_pretrained, small and random;  outputs/: inputs, and what was made of them
    text.jsonl       a text;  tokens/: what ``m2rnn prepare`` made of it
    train/, track/   killed/: a run that was killed;  log.jsonl: all steps of the same run that nothing disturbed
    track/finished/  a finished run, without its checkpoint and its plot
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from m2rnn.training.run_log import Log
from safetensors.torch import save_file
from shared import (
    DATA,
    NEW_TOKENS,
    PREPARE,
    RUNS,
    commands,
    machine,
    outputs_of,
    presets,
    read_json,
    resolve,
    run_command,
    signatures_of,
    tokens_of,
)
from torch import Tensor
from transformers import PreTrainedModel

import m2rnn
from m2rnn import M2RNNConfig, M2RNNForCausalLM
from tests.convert.hybrids import make as make_hybrid

COMMIT = "94d239c36ee864aa6829bba24cb917a52e7fe5f6"
TREE = Path(m2rnn.__file__).parents[1]
VOCAB = 64
SAME: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        "mixers": ["m2rnn", "m2rnn"],
        "mixer_options": {"m2rnn": {"num_heads": 4, "key_dim": 8, "value_dim": 4}},
        "mlp_options": {"swiglu": {"intermediate_size": 32}},
    },
    "experts": {
        "mixers": ["m2rnn", "attention"],
        "mlps": ["moe", "moe"],
        "mixer_options": {"m2rnn": {"num_heads": 4, "key_dim": 8, "value_dim": 4}},
        "mlp_options": {
            "moe": {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "intermediate_size": 8,
                "shared_intermediate_size": 16,
            }
        },
    },
    "hybrid": {
        "mixers": ["m2rnn", "attention", "gated_deltanet", "mamba2", "gru", "rnn"],
        "mixer_options": {
            "m2rnn": {"num_heads": 4, "key_dim": 8, "value_dim": 4},
            "attention": {"num_heads": 4, "num_kv_heads": 2, "rope_theta": 10000.0},
            "gated_deltanet": {"num_heads": 2, "key_dim": 4, "value_dim": 8},
            "mamba2": {"num_heads": 4, "state_size": 8},
            "gru": {"num_heads": 2, "head_dim": 8},
            "rnn": {"num_heads": 2, "head_dim": 8},
        },
        "mlp_options": {"swiglu": {"intermediate_size": 24}},
    },
    "options": {  # other values of what the ones above leave as it is
        "mixers": ["m2rnn", "attention", "gated_deltanet", "mamba2", "gru", "rnn"],
        "mlps": ["swiglu", "none", "none", "none", "swiglu", "none"],
        "mixer_options": {
            "m2rnn": {
                "key_dim": 4,
                "value_dim": 8,
                "num_q_heads": 2,
                "num_k_heads": 4,
                "num_v_heads": 2,
                "num_f_heads": 4,
                "num_weight_heads": 1,
                "num_g_heads": 2,
                "conv_size": None,
                "activation": None,
                "residual": False,
                "weight_init": "normal",
                "state_clip": None,
            },
            "attention": {"num_heads": 2, "head_dim": 6},
            "gated_deltanet": {
                "num_heads": 2,
                "key_dim": 4,
                "value_dim": 4,
                "num_householder": 2,
                "negative_eigenvalues": True,
                "conv_size": 2,
                "norm_eps": 1e-3,
            },
            "mamba2": {"num_heads": 2, "state_size": 4, "inner_size": 16, "conv_bias": False, "norm": False},
            "gru": {"num_heads": 1, "head_dim": 12, "conv_size": None, "gate": False, "weight_std": None},
            "rnn": {"num_heads": 3, "head_dim": 4, "activation": None, "norm": False, "norm_eps": 1e-3},
        },
        "mlp_options": {"swiglu": {"intermediate_size": 24}},
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": True,
    },
}
RECIPE = """# A run of a few seconds, of every kind of layer that trains.
preset: tiny-hybrid-m2rnn
model:
  mixers: [m2rnn, attention, gated_deltanet, mamba2, gru, rnn]
  mlps: [swiglu, moe, none, none, none, none]
  hidden_size: 16
  tie_word_embeddings: true
  mixer_options:
    m2rnn: {num_heads: 2, key_dim: 4, value_dim: 4}
    attention: {num_heads: 2}
    gated_deltanet: {num_heads: 2, key_dim: 4, value_dim: 4}
    mamba2: {num_heads: 2, state_size: 4}
    gru: {num_heads: 2, head_dim: 4}
    rnn: {num_heads: 2, head_dim: 4}
  mlp_options:
    swiglu: {intermediate_size: 16}
    moe: {num_experts: 4, num_experts_per_tok: 2, intermediate_size: 4, shared_intermediate_size: 8}
context: 24
batch_size: 4
micro_batch_size: 2
steps: 8
warmup_steps: 2
learning_rate: 3.0e-3
checkpoint_every: 4
device: cpu
report_to: []
"""
KILLED_AFTER = 6  # lines of the log, and so steps; the checkpoint is of step 4
WORDS = ["state", "matrix", "token", "gate", "head", "key", "value", "query", "recurrent", "layer", "scan", "chunk"]
CLOSE = 1e-3  # of two logits, that another processor's rounding must not exchange


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overwrite", action="store_true", help="delete data/ and make it anew")
    overwrite = parser.parse_args().overwrite
    check_tree()
    if DATA.exists():
        if not overwrite:
            parser.error(f"{DATA} is there: the tests want it as it is; --overwrite makes it anew")
        shutil.rmtree(DATA)
    DATA.mkdir()
    torch.set_num_threads(1)
    write_json("made_by.json", {"commit": COMMIT, **machine()})
    write_json("api.json", api())
    write_json("commands.json", commands())
    write_json("presets.json", presets())
    with contextlib.chdir(DATA):
        make_runs()
        make_models()
        make_tokens()
    check_whose_paths()


def check_tree() -> None:
    """This library must be the commit's, unchanged."""
    git = ["git", "-C", str(TREE)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    if head != COMMIT or changed:
        raise SystemExit(f"m2rnn is imported from {TREE}, at {head[:7]}{', changed' if changed else ''}: see --help")


def api() -> dict[str, Any]:
    """The names by which the documents call the library, what ``__all__`` of their modules names, their signatures.

    A module is None.
    """
    files = [*sorted((TREE / "docs").glob("*.md")), TREE / "CHANGELOG.md", TREE / "README.md"]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    names = {"m2rnn", "m2rnn.ops", "m2rnn.layers", "m2rnn.models", "m2rnn.convert"}
    for name in re.findall(r"(?<![\w./])(?:m2rnn|presets)(?:\.[A-Za-z_]\w*)+", text):
        names.add(name if name.startswith("m2rnn") else "m2rnn." + name)
    for module, imported in re.findall(r"from (m2rnn[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    modules = {name: resolve(name) for name in names if isinstance(resolve(name), ModuleType)}
    for module, found in modules.items():
        own = [name for name, value in vars(found).items() if getattr(value, "__module__", None) == found.__name__]
        named = [name for name in own if not name.startswith("_") and re.search(rf"`(?:presets\.)?{name}\b", text)]
        names |= {f"{module}.{name}" for name in getattr(found, "__all__", named)}
    return {name: None if name in modules else signatures_of(resolve(name)) for name in sorted(names)}


def make_runs() -> None:
    """The text, its token files, and the runs; first, since a process that is forked should have no threads."""
    lines = [{"text": document(number)} for number in range(40)]
    Path("text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, command in PREPARE.items():
        run_command(command, Path("tokens", name))
    for name, command in RUNS.items():
        Path(name).mkdir()
        Path("train", "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        run_and_kill(command, Path(name, "killed"))
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole"
            run_command(command, whole)
            shutil.copy(whole / "log.jsonl", name)
            results = read_json(whole / "results.json")
            if name == "train":
                results["settings"].pop("data")
                kept = ("settings", "parameters", "steps", "tokens", "loss", "valid")
                write_json("train/results.json", {key: results[key] for key in kept})
            else:
                unwanted = shutil.ignore_patterns("checkpoints", "*.png")
                shutil.copytree(whole, Path(name, "finished"), ignore=unwanted)


def run_and_kill(command: str, folder: Path) -> None:
    """Run in a child process that is killed with SIGKILL just after a line of its log."""
    child = os.fork()
    if child == 0:
        write = Log.write

        def write_and_die(log: Log, **values: Any) -> None:
            write(log, **values)
            if values["step"] == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

        Log.write = write_and_die  # type: ignore[method-assign]
        try:
            run_command(command, folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]


def document(number: int) -> str:
    """A sentence or two, of another length each time, with letters of two and more bytes."""
    words = [WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(5 + number % 9)]
    return f"{number} – {' '.join(words)}. Größe {number * number} 漢字"[: 120 if number else 3]


def make_models() -> None:
    for name, fields in MODELS.items():
        model = random_weights(M2RNNForCausalLM(M2RNNConfig(**SAME | fields)), seed=len(name))
        save(name, model, inputs_of(VOCAB))
    kinds = ["linear_attention", "linear_attention", "full_attention", "full_attention"]
    hybrid = make_hybrid("qwen3_5", torch.float32, layer_types=kinds, num_hidden_layers=4, initializer_range=0.1)
    m2rnn.swap(hybrid, [0], num_heads=4, key_dim=8, value_dim=8)
    m2rnn.swap(hybrid, [2], num_heads=2, key_dim=4, value_dim=8, conv_size=None)
    save("swapped", random_weights(hybrid, seed=1), inputs_of(hybrid.config.vocab_size, packs=False))
    tracked = M2RNNForCausalLM.from_pretrained("track/finished/model")
    save(None, tracked, inputs_of(tracked.config.vocab_size), outputs="tracked")


@torch.no_grad()
def random_weights(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """No two weights alike, and none without effect, as ones, zeros and identities would be."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.add_(noise, alpha=0.2 if parameter.dim() > 1 else 0.1)
    return model


def inputs_of(vocab_size: int, packs: bool = True) -> dict[str, Tensor]:
    """See ``outputs_of``."""
    generator = torch.Generator().manual_seed(vocab_size)
    lowest = 3 if vocab_size > 8 else 0  # special tokens, where there are any

    def ids(rows: int, steps: int) -> Tensor:
        return torch.randint(lowest, vocab_size, (rows, steps), generator=generator)

    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    if packs:
        mask[1, 10:] = 0
    inputs = {"ids": ids(2, 12), "mask": mask, "prompt": ids(2, 5)}
    if packs:
        inputs |= {"packed": ids(1, 14), "cu_seq_lens_q": torch.tensor([0, 6, 7, 14])}
    return inputs


def save(name: str | None, model: PreTrainedModel, inputs: dict[str, Tensor], outputs: str | None = None) -> None:
    model.eval()
    if name is not None:
        model.save_pretrained(Path("models", name))
    found = outputs_of(model, inputs)
    for tokens in range(NEW_TOKENS):
        with torch.no_grad():
            best = model(found["generated"][:, : 5 + tokens]).logits[:, -1].topk(2).values
        assert bool((best[:, 0] - best[:, 1] > CLOSE).all()), f"{name}: another seed, two next tokens are too close"
    Path("outputs").mkdir(exist_ok=True)
    tensors = {f"inputs.{key}": value for key, value in inputs.items()} | found
    save_file(tensors, Path("outputs", f"{outputs or name}.safetensors"))


def make_tokens() -> None:
    for name in PREPARE:
        save_file(tokens_of(Path("tokens", name)), Path("outputs", f"tokens-{name}.safetensors"))


def check_whose_paths() -> None:
    """Nothing names a folder of this machine."""
    for file in files():
        content = file.read_bytes()
        for folder in (DATA.parents[2], TREE, Path.home(), Path(tempfile.gettempdir())):
            assert f"{folder}/".encode() not in content, f"{file} names {folder}"


def files() -> Iterator[Path]:
    return (path for path in sorted(DATA.rglob("*")) if path.is_file())


def write_json(name: str, content: dict[str, Any]) -> None:
    """One line an entry."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
    (DATA / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
