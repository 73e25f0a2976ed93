"""Token files that are not what was written are refused by name; they are read where they lie."""

import json
import pickle
from pathlib import Path

import pytest

from m2rnn.data.sources import DataError
from m2rnn.data.token_files import TokenDataset
from m2rnn.data.tokenizers import byte_tokenizer, train_bpe
from tests.data.text import TEXTS, prepared, texts_of

FULL = [text for text in TEXTS if text]


@pytest.fixture
def data(tmp_path):
    return prepared(tmp_path, FULL)


def test_documents_are_found_by_number_and_by_token(data):
    assert texts_of(data) == FULL
    token = 0
    for number, text in enumerate(FULL):
        for _ in range(len(text.encode()) + 1):
            assert data.document_at(token) == number
            token += 1
    assert token == data.num_tokens
    data.verify()


@pytest.mark.parametrize(("pad", "expected"), [(7, 7), (0, 0), (None, 0xFF)])
def test_eos_stands_in_for_a_missing_pad(data, pad, expected):
    path = data.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["pad_token_id"] = pad
    path.write_text(json.dumps(manifest))
    assert TokenDataset(data.folder).pad_token_id == expected


def test_nothing_is_copied_into_memory_or_into_a_loader_process(data):
    assert not data.tokens.flags.writeable
    assert not data.tokens.flags.owndata
    copied = pickle.dumps(data)
    assert len(copied) < 1000
    assert texts_of(pickle.loads(copied)) == FULL


@pytest.mark.parametrize("name", ["train.tokens.bin", "train.tokens.crc32", "train.documents.bin"])
def test_a_missing_truncated_or_longer_file_is_named_on_opening(data, name):
    path = data.folder / name
    content = path.read_bytes()
    for changed in (content[:-1], content[:-8], b"", content + b"\0"):
        path.write_bytes(changed)
        message = rf"{name} has {len(changed)} bytes, not {len(content)} as in manifest\.json"
        with pytest.raises(DataError, match=message):
            TokenDataset(data.folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: No such file"):
        TokenDataset(data.folder)


@pytest.mark.parametrize("name", ["train.tokens.bin", "train.documents.bin"])
def test_any_changed_byte_is_found(data, name):
    path = data.folder / name
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError, match=f"{name} is not what m2rnn prepare wrote"):
            TokenDataset(data.folder).verify()


def test_changed_tokens_are_found_where_they_are_read_and_changed_ends_on_opening(data):
    for path in (data.tokens_path, data.documents_path):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{path.name} is not what m2rnn prepare wrote"):
            TokenDataset(data.folder).read(0, 1)
        path.write_bytes(content)
    assert TokenDataset(data.folder).read(3, 9).tolist() == data.tokens[3:9].tolist()


def test_a_folder_that_is_not_finished_is_refused(data, tmp_path):
    manifest = data.folder / "manifest.json"
    content = manifest.read_text()
    for changed, message in {
        content[:-20]: "manifest.json is damaged",
        "[]": "manifest.json is damaged",
        json.dumps(json.loads(content) | {"format": "m2rnn tokens 0"}): "has the format 'm2rnn tokens 0'",
        json.dumps({"format": json.loads(content)["format"]}): r"manifest.json is damaged \(KeyError\('splits'\)\)",
        json.dumps(json.loads(content) | {"splits": {"train": 3}}): r"manifest.json is damaged \(TypeError",
    }.items():
        manifest.write_text(changed)
        with pytest.raises(DataError, match=message):
            TokenDataset(data.folder)
    manifest.unlink()
    for folder in (data.folder, tmp_path / "none"):
        with pytest.raises(DataError, match="holds no finished token files: make them with m2rnn prepare"):
            TokenDataset(folder)
    with pytest.raises(DataError, match="is a file"):
        TokenDataset(tmp_path / "source.jsonl")


def test_another_tokenizer_is_refused(data, tmp_path):
    data.check_tokenizer(data.load_tokenizer())
    data.check_tokenizer(byte_tokenizer())
    other = train_bpe(TEXTS, 290)
    with pytest.raises(DataError, match=r"the model's is not the tokenizer that made .* \(bytes, 256 ids\)"):
        data.check_tokenizer(other, "the model's")
    other.save_pretrained(data.folder / "tokenizer")
    with pytest.raises(DataError, match=r"the tokenizer in .* is not the tokenizer that made"):
        data.load_tokenizer()
    with pytest.raises(DataError, match="tokenizer is not what m2rnn prepare wrote"):
        data.verify()
    for harm in (lambda file: file.write_text('{"vers'), Path.unlink):
        harm(data.folder / "tokenizer" / "tokenizer.json")
        with pytest.raises(DataError, match="tokenizer is not what m2rnn prepare wrote"):
            data.verify()
