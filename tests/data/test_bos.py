"""Whether a text begins with bos is decided once, by the tokenizer or by --bos, and every command follows."""

import json
from pathlib import Path

import pytest
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from m2rnn.data.sources import DataError, Reading
from m2rnn.data.token_files import TokenDataset
from m2rnn.data.tokenizers import BOS, EOS, adds_bos, byte_tokenizer, set_bos, tokenizer_hash
from m2rnn.evaluation.harness import with_one_bos
from m2rnn.evaluation.text import from_files, from_token_folder
from tests.data.text import prepared

TEXTS = ["one", "two words", "é"]
TEMPLATE = TemplateProcessing(["<|bos|>", "$A"], ["<|bos|>", "$A", "$B:1"], [("<|bos|>", BOS)])


def beginning_by_template() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TEMPLATE
    return tokenizer


def beginning_after_another_processor() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), TEMPLATE])
    return tokenizer


def beginning_by_an_attribute() -> PreTrainedTokenizerFast:
    """As Llama's, of which transformers makes the template when it loads."""
    plain = byte_tokenizer()
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, add_bos_token=True, **special)


MADE = [byte_tokenizer, beginning_by_template, beginning_after_another_processor, beginning_by_an_attribute]


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_tokenizer_begins_texts_as_it_is_told_also_when_it_is_loaded_again(tmp_path, make, wanted):
    tokenizer = make()
    assert adds_bos(tokenizer) == (make is not byte_tokenizer)
    before = tokenizer_hash(tokenizer)
    set_bos(tokenizer, wanted)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, again):
        assert each("ab")["input_ids"] == [BOS] * wanted + [97, 98]
        assert each("ab", add_special_tokens=False)["input_ids"] == [97, 98]
        assert tokenizer_hash(each) == before


def test_a_tokenizer_without_bos_cannot_begin_with_it():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<|eos|>")
    with pytest.raises(DataError, match="no bos token"):
        set_bos(tokenizer, True)


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("bos", [None, True, False])
def test_tokens_of_a_folder_and_of_a_file_are_the_same(tmp_path, make, bos):
    make().save_pretrained(tmp_path / "tokenizer")
    data = prepared(tmp_path / "made", TEXTS, tokenizer=str(tmp_path / "tokenizer"), bos=bos)
    begins = make is not byte_tokenizer if bos is None else bos
    assert data.manifest["bos"] is begins
    expected = [id for text in TEXTS for id in [*([BOS] if begins else []), *text.encode(), EOS]]
    assert data.tokens.tolist() == expected
    tokenizer = AutoTokenizer.from_pretrained(data.folder / "tokenizer")
    assert adds_bos(tokenizer) == adds_bos(data.load_tokenizer()) == begins
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    assert from_files(str(file), Reading(), tokenizer).tokens.tolist() == expected
    assert from_token_folder(data.folder, "train").tokens.tolist() == expected


@pytest.mark.parametrize("begins", [True, False])
def test_the_tokenizer_of_an_older_folder_is_set_to_what_its_documents_are(tmp_path, begins):
    """It kept the tokenizer as it was, whatever the documents began with, and hashed the template."""
    folder = Path(prepared(tmp_path / "made", TEXTS, bos=begins).folder)
    other = byte_tokenizer() if begins else beginning_by_template()
    other.save_pretrained(folder / "tokenizer")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = tokenizer_hash(other, with_template=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = TokenDataset(folder)
    data.verify()
    tokenizer = data.load_tokenizer()
    assert adds_bos(tokenizer) == begins
    data.check_tokenizer(tokenizer)  # that of a model which was trained on the folder


def test_a_rolling_likelihood_sees_one_bos():
    class Model:
        prefix_token_id = 1

        def tok_encode(self, text, add_special_tokens=None):
            return [1, *map(ord, text)]

        def loglikelihood_rolling(self, requests):
            return [[self.prefix_token_id, *self.tok_encode(request)] for request in requests]

    model = with_one_bos(Model)()
    assert model.loglikelihood_rolling(["ab"]) == [[1, 97, 98]]
    assert model.tok_encode("ab") == [1, 97, 98], "elsewhere the tokenizer decides"
