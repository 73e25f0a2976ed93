"""Token files hold every document once, in order, whatever happens while they are written."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from typer.testing import CliRunner, Result

from m2rnn import cli
from m2rnn.data import prepare as preparing
from m2rnn.data import sources
from m2rnn.data.prepare import Settings, prepare
from m2rnn.data.sources import DataError, Reading
from m2rnn.data.token_files import TokenDataset
from m2rnn.data.tokenizers import train_bpe
from m2rnn.runs.folder import RunFolderError
from tests.data.text import TEXTS, prepared, texts, texts_of, write_json_lines, write_parquet

ROOT = Path(__file__).parents[2]
FULL = [text for text in TEXTS if text]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["prepare", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    """What decides the data: everything but the settings, which name the sources' times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("settings.json", "lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def many(count: int) -> list[str]:
    dice = random.Random(count)
    return [f"{number}:" + "ü" * dice.randint(0, 40) for number in range(count)]


@settings(max_examples=20)
@given(texts, st.integers(1, 100))
def test_every_document_is_there_once_in_order(tmp_path_factory, texts, block):
    if not any(texts):
        texts = [*texts, "x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", block)
        patch.setattr(preparing, "BLOCK_BYTES", 2 * block)
        data = prepared(tmp_path_factory.mktemp("data"), texts)
    assert texts_of(data) == [text for text in texts if text]
    assert data.manifest["empty"] == texts.count("")
    assert data.num_bytes == sum(len(text.encode()) for text in texts)
    assert (data.num_tokens, data.num_documents) == (len(data.tokens), len(data.ends))


@pytest.mark.parametrize("tokenizer", ["bytes", "train-bpe"])
def test_any_number_of_processes_and_any_blocks_write_the_same_files(tmp_path, monkeypatch, tokenizer):
    source = write_json_lines(tmp_path / "source.jsonl.gz", many(300))
    wanted = Settings({"train": [str(source)]}, tokenizer=tokenizer, vocab_size=300, valid_fraction=0.2)
    written = []
    for block, processes in ((2**22, 1), (500, 1), (700, 3)):
        monkeypatch.setattr(sources, "PIECE_BYTES", block)
        monkeypatch.setattr(preparing, "BLOCK_BYTES", block)
        folder = tmp_path / f"{block}"
        prepare(wanted, folder, processes=processes)
        written.append(contents(folder))
    assert written[0] == written[1] == written[2]


def test_bpe_tokens_are_the_text(tmp_path):
    data = prepared(tmp_path, many(50), tokenizer="train-bpe", vocab_size=320)
    tokenizer = data.load_tokenizer()
    decoded = [tokenizer.decode(data.document(number)[:-1]) for number in range(data.num_documents)]
    assert decoded == many(50)
    assert data.tokens.dtype == np.uint16
    assert data.num_tokens < data.num_bytes
    assert (data.tokens == data.eos_token_id).sum() == 50


def test_a_tokenizer_made_before_is_used_by_its_folder(tmp_path):
    first = prepared(tmp_path / "first", many(50), tokenizer="train-bpe", vocab_size=300)
    second = prepared(tmp_path / "second", many(50), tokenizer=str(first.folder / "tokenizer"), bos=True)
    assert second.tokenizer_hash == first.tokenizer_hash
    bos = second.manifest["tokenizer"]["bos_token_id"]
    for number in range(50):
        assert second.document(number).tolist() == [bos, *first.document(number)]


def test_another_tokenizer_under_the_same_name_is_refused(tmp_path):
    first = prepared(tmp_path / "first", many(50), tokenizer="train-bpe", vocab_size=300)
    name = first.folder / "tokenizer"
    wanted = Settings({"train": [str(tmp_path / "first")]}, Reading(glob="*.jsonl"), tokenizer=str(name))
    manifest = prepare(wanted, tmp_path / "second", processes=1)
    assert prepare(wanted, tmp_path / "second", processes=1) == manifest
    config = name / "tokenizer_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"eos_token": "<|pad|>"}))
    with pytest.raises(RunFolderError, match="tokenizer"):
        prepare(wanted, tmp_path / "second", processes=1)
    config.write_text(before)
    assert prepare(wanted, tmp_path / "second", processes=1) == manifest
    train_bpe(many(50), 310).save_pretrained(name)
    for changed in (wanted, replace(wanted, tokenizer=str(name / "tokenizer.json"))):
        with pytest.raises(RunFolderError, match="tokenizer"):
            prepare(changed, tmp_path / "second", processes=1)


def test_a_folder_made_anew_is_written_with_its_new_tokenizer(tmp_path):
    for trained_on in (many(50), TEXTS):
        train_bpe(trained_on, 300).save_pretrained(tmp_path / "bpe")
        data = prepared(tmp_path, many(50), tokenizer=str(tmp_path / "bpe"), overwrite=True)
        tokenizer = data.load_tokenizer()
        for number, text in enumerate(many(50)):
            assert data.document(number)[:-1].tolist() == tokenizer(text)["input_ids"]


def test_a_share_of_the_documents_goes_to_validation_with_its_copies(tmp_path):
    source = write_json_lines(tmp_path / "source.jsonl", many(400) * 2)
    reverse = write_json_lines(tmp_path / "reverse.jsonl", many(400)[::-1])
    halves = []
    for path in (source, reverse):
        prepare(Settings({"train": [str(path)]}, valid_fraction=0.25), tmp_path / path.stem, processes=1)
        halves.append([texts_of(TokenDataset(tmp_path / path.stem, split)) for split in ("train", "valid")])
    (train, valid), (reverse_train, reverse_valid) = halves
    assert sorted(train + valid) == sorted(many(400) * 2)
    assert not set(train) & set(valid)
    assert train[: len(train) // 2] == reverse_train[::-1]
    assert valid[: len(valid) // 2] == reverse_valid[::-1]
    assert 70 < len(reverse_valid) < 130


def test_splits_from_their_own_sources(tmp_path):
    given = {"train": [str(write_json_lines(tmp_path / "a.jsonl", ["train"])), str(tmp_path / "b.txt")]}
    (tmp_path / "b.txt").write_text("more")
    given["test"] = [str(write_parquet(tmp_path / "c.parquet", ["test", "test 2"]))]
    manifest = prepare(Settings(given), tmp_path / "tokens", processes=1)
    assert list(manifest["splits"]) == ["train", "test"]
    assert texts_of(TokenDataset(tmp_path / "tokens")) == ["train", "more"]
    assert texts_of(TokenDataset(tmp_path / "tokens", "test")) == ["test", "test 2"]
    with pytest.raises(DataError, match="has no split 'valid', but train, test"):
        TokenDataset(tmp_path / "tokens", "valid")


def test_the_share_for_validation_is_of_the_training_text_alone(tmp_path):
    given = {split: [str(write_json_lines(tmp_path / f"{split}.jsonl", many(40)))] for split in ("train", "test")}
    prepare(Settings(given, valid_fraction=0.5), tmp_path / "tokens", processes=1)
    assert texts_of(TokenDataset(tmp_path / "tokens", "test")) == many(40)
    counts = [TokenDataset(tmp_path / "tokens", split).num_documents for split in ("train", "valid")]
    assert sum(counts) == 40
    assert min(counts) > 0


def test_token_files_within_their_own_source_are_no_text(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    wanted = Settings({"train": ["."]})
    manifest = prepare(wanted, Path("tokens"), processes=1)
    assert prepare(wanted, Path("tokens"), processes=1) == manifest
    prepare(wanted, tmp_path / "tokens", processes=1, overwrite=True)
    assert texts_of(TokenDataset("tokens")) == ["a", "b"]


@pytest.mark.parametrize("file", ["train.tokens.bin", "train.tokens.crc32", "train.documents.bin"])
def test_a_finished_folder_that_lacks_a_file_is_not_called_finished(tmp_path, file):
    source = write_json_lines(tmp_path / "a.jsonl", ["1", "2"])
    arguments = (source, "--processes=1", "--out", tmp_path / "tokens")
    assert run(*arguments).exit_code == 0
    before = contents(tmp_path / "tokens")
    (tmp_path / "tokens" / file).unlink()
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"{file}: No such file" in result.stderr
    assert "--overwrite" in result.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    assert contents(tmp_path / "tokens") == before


def test_ctrl_c_stops_the_training_of_a_tokenizer(tmp_path):
    def texts_then_ctrl_c():
        for number in itertools.count():
            if number == 10_000:
                os.kill(os.getpid(), signal.SIGINT)
            if number > 10_000:
                time.sleep(0.001)
            if number == 20_000:
                return
            yield f"text {number}"

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_bpe(texts_then_ctrl_c(), 300)
    assert time.monotonic() - started < 5


def test_ctrl_c_while_a_tokenizer_is_trained_does_not_abort_python():
    code = """if True:
        import itertools, os, signal, sys, time
        from m2rnn.data.tokenizers import train_bpe

        def texts():
            for number in itertools.count():
                if number == 1000:
                    os.kill(os.getpid(), signal.SIGINT)
                if number > 1000:
                    time.sleep(0.001)  # as a read from a slow disk: without the interpreter's lock
                yield f"text {number}"

        try:
            train_bpe(texts(), 300)
        except KeyboardInterrupt:
            sys.exit(3)
    """
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, b"")


@pytest.mark.parametrize("name", ["settings.json", "progress.json"])
def test_damaged_notes_of_an_unfinished_folder_are_named(tmp_path, name):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    arguments = (tmp_path / "a.txt", "--processes=1", "--out", tmp_path / "tokens")
    assert run(*arguments).exit_code == 2
    (tmp_path / "tokens" / name).write_text('{"sour')
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"{name} is damaged" in result.stderr
    assert "overwrite" in result.stderr


def test_text_that_cannot_be_read_stops_or_is_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n' + b'{"text": "\xff"}\n' * 150 + b'{"text": "2"}\n')
    wanted = Settings({"train": [str(path)]})
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: not UTF-8: byte 0xff at position 10.*--on-error"):
            prepare(wanted, tmp_path / "tokens", processes=1)
        with pytest.raises(DataError, match="holds no finished token files"):
            TokenDataset(tmp_path / "tokens")
    manifest = prepare(wanted, tmp_path / "tokens", processes=1, on_error="skip")
    assert manifest["rejected"] == 150
    assert len(manifest["first_rejected"]) == 100
    assert manifest["first_rejected"][99].startswith(f"{path}, line 101: not UTF-8")
    assert texts_of(TokenDataset(tmp_path / "tokens")) == ["1", "2"]


def test_of_a_cut_archive_whole_documents_are_kept_and_the_damage_counts_once(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl.gz", many(1000))
    path.write_bytes(path.read_bytes()[:-9])
    arguments = (path, "--processes=1", "--out", tmp_path / "tokens")
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"{path}, line 1001: cannot be read from here on: the file ends within compressed data" in result.stderr
    assert "--on-error" in result.stderr
    result = run(*arguments, "--on-error=skip")
    assert result.exit_code == 0, result.output
    assert texts_of(TokenDataset(tmp_path / "tokens")) == many(1000)
    assert "1 that cannot be read left out:" in result.stdout
    assert f"next: m2rnn train laptop --data {tmp_path / 'tokens'} --out runs/tokens" in result.stdout
    assert TokenDataset(tmp_path / "tokens").manifest["rejected"] == 1


def test_where_all_is_rejected_the_first_reasons_are_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n' * 12)
    result = run(path, "--processes=1", "--out", tmp_path / "tokens", "--on-error=skip")
    assert result.exit_code == 2
    first, lost, *reasons = result.stderr.splitlines()
    assert first.startswith("m2rnn: no document for train")
    assert lost == "12 that cannot be read were left out, first:"
    assert len(reasons) == 10
    assert reasons[0].startswith(f"  {path}, line 1: ")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2", ".zst"])
def test_of_damaged_files_any_processes_and_interruptions_write_the_same(tmp_path, monkeypatch, compression):
    text = tmp_path / "text"
    for number in range(3):
        path = write_json_lines(text / f"{number}.jsonl{compression}", many(300 + number))
        path.write_bytes(path.read_bytes()[:-200] if number < 2 else path.read_bytes() + b"no archive")
    table = write_parquet(text / "4.parquet", many(9), rows=3)
    place = parquet.ParquetFile(table).metadata.row_group(1).column(1).dictionary_page_offset
    content = table.read_bytes()
    table.write_bytes(content[:place] + b"\xff" * 20 + content[place + 20 :])
    monkeypatch.setattr(sources, "PIECE_BYTES", 500)
    monkeypatch.setattr(preparing, "BLOCK_BYTES", 500)
    wanted = Settings({"train": [str(text)]}, valid_fraction=0.2)
    manifest = prepare(wanted, tmp_path / "1", processes=1, on_error="skip")
    splits = [texts_of(TokenDataset(tmp_path / "1", split)) for split in ("train", "valid")]
    assert len(splits[0]) + len(splits[1]) >= 302 + 6
    assert manifest["rejected"] == 3 + 3  # the damage of three files, three rows
    assert [reason.split(": ")[0].split(", ")[0] for reason in manifest["first_rejected"]] == [
        str(path) for path in sorted(text.iterdir())
    ]
    assert "6 that cannot be read left out:" in preparing.table(manifest)
    prepare(wanted, tmp_path / "2", processes=2, on_error="skip")

    blocks = itertools.count(1)

    def interrupt(_: str) -> None:
        if next(blocks) % 7 == 0:
            raise KeyboardInterrupt

    interruptions = 0
    while not (tmp_path / "3" / "manifest.json").exists():
        try:
            prepare(wanted, tmp_path / "3", processes=1, on_error="skip", commit_seconds=0, update=interrupt)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions > 3
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_a_byte_order_mark_becomes_no_tokens(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "c.txt").write_bytes("four".encode("utf-16"))
    wanted = Settings({"train": [str(tmp_path / "*.*")]})
    with pytest.raises(DataError, match=r"c\.txt, document 1: UTF-16, expected UTF-8: convert the file"):
        prepare(wanted, tmp_path / "tokens", processes=1)
    manifest = prepare(wanted, tmp_path / "tokens", processes=1, on_error="skip")
    assert texts_of(TokenDataset(tmp_path / "tokens")) == ["one", "two", "three"]
    assert (manifest["rejected"], manifest["splits"]["train"]["bytes"]) == (1, 11)


def test_killed_at_any_moment_it_goes_on_without_loss_or_doubles(tmp_path, monkeypatch):
    source = write_json_lines(tmp_path / "source.jsonl", many(60))
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    monkeypatch.setattr(preparing, "BLOCK_BYTES", 100)
    prepare(Settings({"train": [str(source)]}, valid_fraction=0.3), tmp_path / "whole", processes=1)
    seeds = ["0", "1", "2"]
    command = [sys.executable, str(ROOT / "tests/data/prepare_and_kill.py"), source, tmp_path, *seeds]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(map(int, done.stdout.split())) >= 10
    for seed in seeds:
        assert contents(tmp_path / seed) == contents(tmp_path / "whole")


def test_the_processes_end_with_the_one_that_started_them(tmp_path):
    code = f"""if True:
        import os, signal, time
        from multiprocessing import active_children
        from pathlib import Path
        from m2rnn.data import prepare as preparing, sources
        from m2rnn.data.prepare import Settings, prepare

        def update(text):
            print(*(child.pid for child in active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        if __name__ == "__main__":
            sources.PIECE_BYTES = preparing.BLOCK_BYTES = 50
            prepare(Settings({{"train": [{str(tmp_path / "a.jsonl")!r}]}}), Path({str(tmp_path / "tokens")!r}),
                    processes=2, update=update)
    """
    write_json_lines(tmp_path / "a.jsonl", many(100))
    (tmp_path / "script.py").write_text("import textwrap\n" + code)
    # Its children hold the other end of the pipe: run returns when all of them are gone.
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, timeout=60
    )
    assert len(done.stdout.split()) == 2


@pytest.mark.parametrize("limit", [100, 2000, 20_000])  # in the settings, the tokenizer, the tokens
def test_a_full_disk_is_named_and_once_there_is_room_it_goes_on(tmp_path, limit):
    source = write_json_lines(tmp_path / "source.jsonl", many(3000))
    arguments = [source, "--processes=1", "--out", tmp_path / "tokens"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    assert "File too large" in result.stderr
    assert f"the same command goes on in {tmp_path / 'tokens'}" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "tokens/manifest.json").exists()
    assert run(*arguments).exit_code == 0
    assert texts_of(TokenDataset(tmp_path / "tokens")) == many(3000)


def test_progress_that_is_not_on_disk_is_refused(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", ["1", "2"])
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    wanted = Settings({"train": [str(path), str(tmp_path / "bad.txt")]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "BLOCK_BYTES", 1)
        with pytest.raises(DataError):
            prepare(wanted, tmp_path / "tokens", processes=1, commit_seconds=0)
    partial = tmp_path / "tokens/train.tokens.bin.partial"
    assert partial.read_bytes() == b"1\xff2\xff"
    partial.write_bytes(b"1\xff")
    with pytest.raises(DataError, match=r"train\.tokens\.bin\.partial has 2 bytes, but 4 were written.*--overwrite"):
        prepare(wanted, tmp_path / "tokens", processes=1)


def test_other_settings_or_changed_sources_are_refused(tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", ["1", "2"])
    wanted = Settings({"train": [str(source)]})
    manifest = prepare(wanted, tmp_path / "tokens", processes=1)
    before = contents(tmp_path / "tokens")
    assert prepare(wanted, tmp_path / "tokens", processes=1) == manifest
    with pytest.raises(RunFolderError, match="bos = false, not true"):
        prepare(Settings({"train": [str(source)]}, bos=True), tmp_path / "tokens")
    write_json_lines(source, ["1", "2", "3"])
    with pytest.raises(RunFolderError, match="versions"):
        prepare(wanted, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == before
    prepare(wanted, tmp_path / "tokens", processes=1, overwrite=True)
    assert texts_of(TokenDataset(tmp_path / "tokens")) == ["1", "2", "3"]


def test_the_command_prints_what_it_wrote(tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", [*FULL, "", "more"], field="body")
    with source.open("ab") as file:
        file.write(b"not JSON\n")
    (tmp_path / "b.txt").write_text("1\n22\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/c.md").write_text("c")
    result = run(
        source, "--field=body", "--valid", tmp_path / "b.txt", r"--separator=\n", "--test", tmp_path / "c",
        "--glob=*.md", "--on-error=skip", "--processes=1", "--bos", "--out", tmp_path / "tokens",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    size = sum(len(text.encode()) for text in [*FULL, "more"])
    assert rows["train"][:3] == [str(len(FULL) + 1), str(size + 2 * (len(FULL) + 1)), str(size)]
    assert rows["valid"][:3] == ["2", "7", "3"]
    assert rows["test"][:3] == ["1", "3", "1"]
    assert "1 empty documents left out" in result.stdout
    assert "1 that cannot be read left out:" in result.stdout
    assert f"{source}, line 8: not JSON" in result.stdout
    assert run(source, "--out", tmp_path / "tokens").exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--valid-fraction=1"], "valid_fraction 1.0"),
        (["--valid-fraction=0.5", "--valid=a.txt"], "only one of them"),
        (["--tokenizer=train-bpe", "--vocab-size=10"], "vocab_size 10: expected at least 259"),
        (["--tokenizer=train-bpe", "--bpe-fraction=0"], "bpe_fraction 0.0"),
        (["--tokenizer=no/such folder"], "tokenizer 'no/such folder'"),
        (["--on-error=explode"], "on_error 'explode'"),
        (["--separator="], "separator ''"),
        (["--field=body"], "line 1: expected an object with the field 'body', found id, text"),
        (["--glob=*.md"], None),
        (["--valid=none.jsonl"], "none.jsonl: no such file or folder"),
        (["--valid-fraction=1e-12"], "no document for valid"),
        (["--processes=0"], "--processes"),
        (["--out=/dev/null"], "cannot write to /dev/null"),
    ],
)
def test_a_mistake_is_named_without_a_traceback(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = write_json_lines(tmp_path / "a.jsonl", ["1", "2"])
    result = run(source, "--processes=1", "--out", tmp_path / "tokens", *options)
    assert result.exit_code == (0 if message is None else 2), result.output
    assert message is None or message in result.stderr
    assert "Traceback" not in result.output


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    first = prepared(tmp_path / "first", ["1"])
    config = first.folder / "tokenizer/tokenizer_config.json"
    described = json.loads(config.read_text())
    del described["eos_token"]
    config.write_text(json.dumps(described))
    with pytest.raises(DataError, match="has no eos token to end documents with"):
        prepared(tmp_path / "second", ["1"], tokenizer=str(config.parent))


def test_reading_is_part_of_the_settings(tmp_path):
    source = write_json_lines(tmp_path / "a.jsonl", ["1"])
    prepare(Settings({"train": [str(source)]}), tmp_path / "tokens", processes=1)
    with pytest.raises(RunFolderError, match="reading"):
        prepare(Settings({"train": [str(source)]}, reading=Reading(field="body")), tmp_path / "tokens")
