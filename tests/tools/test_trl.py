"""TRL: a step of SFT, DPO and GRPO, dense and with experts, by default (bfloat16, checkpoints) and in float32."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from m2rnn.models import M2RNNConfig, M2RNNForCausalLM
from tests.models.fresh import save_tokenizer
from tests.models.small import VOCAB

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of its modules
    trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")  # TRL's
KINDS = pytest.mark.parametrize("mlp", ["swiglu", "moe"])
PRECISION = pytest.mark.parametrize("precision", [{}, {"bf16": False}], ids=["default", "float32"])
TEXTS = [" ".join(f"w{3 + step * start % 19}" for step in range(1, start + 4)) for start in (5, 9, 3, 12)]


@pytest.fixture
def folder(mlp: str, tmp_path: Path) -> Path:
    """A saved model with its tokenizer."""
    torch.manual_seed(0)
    config = M2RNNConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        mixers=["m2rnn", "attention"],
        mlps=[mlp, mlp],
        mixer_options={"m2rnn": {"num_heads": 2, "key_dim": 4, "value_dim": 8}, "attention": {"num_heads": 2}},
        mlp_options={"moe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8}},
        pad_token_id=0,
        eos_token_id=2,
    )
    M2RNNForCausalLM(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def step(
    kind: str, folder: Path, columns: dict[str, list[str]], more: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """What the trainer logs of one step; every parameter must have moved."""
    common = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
    common |= {"save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    arguments = getattr(trl, f"{kind}Config")(output_dir=str(folder / "run"), **common, **options)
    assert arguments.gradient_checkpointing
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(folder),
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(folder),
        **more,
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still
    logged: dict[str, Any] = trainer.state.log_history[0]
    assert ("aux_loss" in logged) == ("moe" in trainer.model.config.mlps)
    return logged


@KINDS
@PRECISION
def test_sft_padded_packed_and_padding_free(folder: Path, precision: dict[str, Any]) -> None:
    losses = {}
    for how in ({}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}):
        losses[str(how)] = step("SFT", folder, {"text": TEXTS}, {}, **how, **precision)["loss"]
    padded, padding_free, _ = losses.values()
    assert padding_free == pytest.approx(padded, rel=1e-5)


@KINDS
@PRECISION
def test_dpo(folder: Path, precision: dict[str, Any]) -> None:
    columns = {"prompt": TEXTS, "chosen": TEXTS[::-1], "rejected": TEXTS[1:] + TEXTS[:1]}
    step("DPO", folder, columns, {}, **precision)


@KINDS
@PRECISION
def test_grpo(folder: Path, precision: dict[str, Any]) -> None:
    def reward(completions: list[str], **others: Any) -> list[float]:
        return [float(number % 2) for number in range(len(completions))]

    options = {"num_generations": 2, "max_completion_length": 6} | precision
    step("GRPO", folder, {"prompt": TEXTS}, {"reward_funcs": reward}, **options)
