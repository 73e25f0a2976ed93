"""Arguments that nothing would hear are errors; those of transformers and its relatives pass."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.models.small import VOCAB, make
from tests.tolerances import assert_close

CLASSES = pytest.mark.parametrize("whole", [True, False], ids=["M2RNNForCausalLM", "M2RNNModel"])
HARMLESS = {
    "cache_position": torch.arange(5),
    "return_dict": True,
    "output_attentions": False,
    "token_type_ids": torch.zeros(2, 5, dtype=torch.int64),
    "num_items_in_batch": None,
    "logits_to_keep": 0,
    "is_causal": True,
    "cu_seq_lens_k": None,
    "max_length_q": 5,
    "max_length_k": 5,
    "seq_idx": None,
    "a_later_versions_argument": None,
}


def made(whole: bool, **overrides):
    model = make(**overrides)
    return model if whole else model.model


def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w3"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0", bos_token="w1", eos_token="w2")


@CLASSES
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("atention_mask", "attention_mask"),
        ("attn_mask", "attention_mask"),
        ("input_embeds", "inputs_embeds"),
        ("past_key_value", "past_key_values"),
        ("use_chache", "use_cache"),
        ("cu_seqlens_q", "cu_seq_lens_q"),
        ("position_id", "position_ids"),
    ],
)
def test_a_misspelt_argument_is_named_with_the_nearest_known_one(whole: bool, name: str, nearest: str) -> None:
    expected = f"{'M2RNNForCausalLM' if whole else 'M2RNNModel'}.forward has no argument '{name}': "
    with pytest.raises(TypeError, match=re.escape(f"{expected}did you mean '{nearest}'? It takes input_ids, ")):
        made(whole)(torch.randint(VOCAB, (2, 5)), **{name: torch.ones(2, 5)})


def test_what_is_like_nothing_known_is_named_with_all_that_is() -> None:
    ids = torch.randint(VOCAB, (2, 5))
    with pytest.raises(TypeError, match=r"'xyz': It takes input_ids, .*labels, .*cache, shift_labels$"):
        make()(ids, xyz=ids)
    with pytest.raises(TypeError, match="'shift_label': did you mean 'shift_labels'"):
        make()(ids, shift_label=ids)
    with pytest.raises(TypeError, match=r"M2RNNModel\.forward has no argument 'labels'"):
        make().model(ids, labels=ids)


@CLASSES
@pytest.mark.parametrize("name", HARMLESS)
def test_arguments_of_transformers_change_nothing(whole: bool, name: str) -> None:
    model, ids = made(whole), torch.randint(VOCAB, (2, 5))
    assert torch.equal(model(ids, **{name: HARMLESS[name]})[0], model(ids)[0])


@CLASSES
def test_attention_weights_are_refused(whole: bool) -> None:
    model, ids = made(whole), torch.randint(VOCAB, (2, 5))
    with pytest.raises(ValueError, match="output_attentions True: expected False, since these models never form"):
        model(ids, output_attentions=True)
    model = made(whole, attn_implementation="eager", output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions True"):
        model(ids)
    assert model(ids, output_attentions=False)[0].shape[:2] == (2, 5)


def test_generate_refuses_attention_weights() -> None:
    with pytest.raises(ValueError, match="output_attentions True"):
        make().generate(
            torch.randint(3, VOCAB, (1, 4)), output_attentions=True, return_dict_in_generate=True, max_new_tokens=2
        )


@CLASSES
def test_what_would_be_another_model_is_refused(whole: bool) -> None:
    model, ids = made(whole), torch.randint(VOCAB, (1, 5))
    with pytest.raises(ValueError, match="is_causal False: expected True"):
        model(ids, is_causal=False)
    packed = {"seq_idx": torch.tensor([[0, 0, 0, 1, 1]], dtype=torch.int32)}
    with pytest.raises(ValueError, match="seq_idx alone packs nothing: give cu_seq_lens_q"):
        model(ids, **packed)
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    assert torch.equal(model(ids, cu_seq_lens_q=bounds, **packed)[0], model(ids, cu_seq_lens_q=bounds)[0])


@pytest.mark.parametrize("name", ["hybrid", "moe"])
def test_trainer_trains_and_evaluates_plain_rows(name: str, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row, "token_type_ids": row * 0} for row in torch.randint(VOCAB, (4, 6))]
    for remove in (True, False):
        arguments = TrainingArguments(
            tmp_path, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", remove_unused_columns=remove
        )
        trainer = Trainer(make(name), arguments, train_dataset=rows, eval_dataset=rows)
        assert trainer.train().training_loss > 0
        assert trainer.evaluate()["eval_loss"] > 0


def test_a_flattened_batch_of_transformers_is_packed() -> None:
    rows = [{"input_ids": row.tolist()} for row in torch.randint(VOCAB, (3, 6))]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"} <= batch.keys()
    model = make()
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows], 1)
    assert_close(model(**batch).logits, alone, torch.float64, "output")


def test_tokenizers_and_pipelines_pass_what_they_make() -> None:
    texts = ["w3 w4 w5", "w6"]
    batch = tokenizer()(texts, return_tensors="pt", padding=True, return_token_type_ids=True)
    assert "token_type_ids" in batch
    model = make(dtype=torch.float32)
    assert model(**batch).logits.shape == (2, 3, VOCAB)
    complete = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    for mode in ({"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 2}):
        found = complete(texts, max_new_tokens=3, batch_size=2, **mode)
        assert [one[0]["generated_text"].startswith(text) for one, text in zip(found, texts, strict=True)] == [True] * 2
    features = pipeline("feature-extraction", model=model.model, tokenizer=tokenizer(), device="cpu")
    assert len(features(texts[0])[0]) == 3


def test_generate_takes_a_tokenizer_as_with_stop_strings() -> None:
    model, ids = make("hybrid"), torch.tensor([[1, 3, 4, 5]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"w": 0}, unk_token="w")))
    arguments = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, tokenizer=tokenizer, **arguments), model.generate(ids, **arguments))
