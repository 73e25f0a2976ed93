"""Tokenizers turn any text into ids and back, survive saving, and are told apart by their hash."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from m2rnn.data.sources import DataError
from m2rnn.data.tokenizers import (
    BOS,
    EOS,
    PAD,
    byte_tokenizer,
    encoder,
    load_tokenizer,
    token_dtype,
    tokenizer_hash,
    train_bpe,
)
from m2rnn.models import M2RNNConfig
from tests.data.text import TEXTS

text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(TEXTS)


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(TEXTS * 3, 300).save_pretrained(folder)
    return folder


@given(text)
def test_the_byte_tokenizer_gives_the_bytes_also_by_way_of_the_library(byte_folder, text):
    expected = list(text.encode())
    for is_bytes in (True, False):
        (ids,) = encoder(byte_folder, is_bytes, np.dtype("u1"))([text])
        assert ids.tolist() == expected
    assert not {PAD, BOS, EOS} & set(expected)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_saved_tokenizers_load_by_auto_tokenizer_and_lose_nothing(byte_folder, bpe_folder, text):
    for folder in (byte_folder, bpe_folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_checkpoint_folder_carries_its_tokenizer(tmp_path):
    M2RNNConfig(vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, BOS, EOS)
    assert len(tokenizer) == 256
    assert tokenizer.decode([104, 105, EOS], skip_special_tokens=True) == "hi"
    assert tokenizer_hash(tokenizer) == tokenizer_hash(tmp_path) == tokenizer_hash(byte_tokenizer())


def test_text_that_looks_like_a_special_token_is_text(bpe_folder):
    (ids,) = encoder(bpe_folder, False, np.dtype("<u2"))(["a<|eos|>b"])
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<|eos|>b"


def test_bpe_is_the_same_each_time_and_merges(bpe_folder):
    assert tokenizer_hash(train_bpe(TEXTS * 3, 300)) == tokenizer_hash(bpe_folder)
    (ids,) = encoder(bpe_folder, False, np.dtype("<u2"))(["a document with"])
    assert len(ids) < len("a document with")


def test_the_hash_changes_with_the_ids_alone(byte_folder, bpe_folder, tmp_path):
    assert tokenizer_hash(byte_folder) != tokenizer_hash(bpe_folder)
    assert tokenizer_hash(train_bpe(TEXTS, 290)) != tokenizer_hash(train_bpe(TEXTS, 291))
    tokenizer = byte_tokenizer()
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert "padding" in json.loads((tmp_path / "tokenizer.json").read_text())
    assert tokenizer_hash(tmp_path) == tokenizer_hash(byte_folder)


def test_documents_are_never_truncated_or_padded(byte_folder, tmp_path):
    tokenizer = Tokenizer.from_file(str(byte_folder / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert [len(ids) for ids in encoder(tmp_path, False, np.dtype("u1"))(["abc", "a"])] == [3, 1]


def test_a_tokenizer_is_loaded_from_its_file_too(byte_folder):
    assert tokenizer_hash(load_tokenizer(byte_folder / "tokenizer.json")) == tokenizer_hash(byte_folder)


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4"), (100352, "<u4")]
)
def test_ids_are_as_small_as_the_vocabulary_allows(size, dtype):
    assert token_dtype(size) == np.dtype(dtype)
    assert np.iinfo(token_dtype(size)).max >= size - 1


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="vocab_size 258: expected at least 259"):
        train_bpe(["a"], 258)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in (tmp_path / "none", tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match=f"tokenizer '{name}': .* Expected 'bytes'"):
            load_tokenizer(name)
