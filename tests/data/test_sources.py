"""Every format gives the same documents, cut anywhere; what cannot be read is named with its place."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from m2rnn.data import sources
from m2rnn.data.sources import DataError, HubDataset, Reading, documents, find_source, pieces
from tests.data.text import COMPRESS, TEXTS, texts, write_json_lines, write_parquet


def read(source: object, **reading: object) -> list[str]:
    """The documents; rejected ones as messages."""
    how = Reading(**reading)
    found = [document for piece in pieces([find_source(str(source), how)], how) for document in documents(piece, how)]
    return [str(document) for document in found]


@pytest.mark.parametrize("compression", COMPRESS)
def test_json_lines_in_any_compression(tmp_path, compression):
    assert read(write_json_lines(tmp_path / f"a.b.jsonl{compression}", TEXTS)) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_members_end_to_end_are_one_file(tmp_path, compression):
    path = write_json_lines(tmp_path / f"a.jsonl{compression}", TEXTS)
    path.write_bytes(path.read_bytes() * 2)
    assert read(path) == TEXTS * 2


def test_tables(tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet", TEXTS)) == TEXTS
    assert read(write_parquet(tmp_path / "b.parquet", TEXTS, field="body"), field="body") == TEXTS


def test_text_files_whole_and_with_separators(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.md").write_bytes(text.encode())
    expected = [text or f"{tmp_path / '1.md'}: empty" for text in TEXTS]
    assert read(tmp_path) == expected
    whole = tmp_path / "whole.txt"
    whole.write_bytes("<|end|>".join(TEXTS).encode())
    assert read(whole, separator="<|end|>") == TEXTS
    whole.write_bytes("<|end|>".join([*TEXTS, ""]).encode())
    assert read(whole, separator="<|end|>") == TEXTS


def test_folders_are_read_in_the_order_of_their_paths_without_hidden_files(tmp_path, monkeypatch):
    for name in ("b/1.txt", "b/2.rst", "a.txt", "b.txt", ".git/c.txt", "c/.d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt", "b/1.txt", "b/2.rst"]
    assert read(tmp_path, glob="**/*.txt") == ["a.txt", "b.txt", "b/1.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    # Only what the wildcards find can be hidden.
    assert read(tmp_path / ".git" / "*.txt") == [".git/c.txt"]
    monkeypatch.chdir(tmp_path / "b")
    assert read("../*.txt") == ["a.txt", "b.txt"]
    assert read("../**/*.rst") == ["b/2.rst"]


@given(texts, st.integers(1, 60))
def test_where_files_are_cut_changes_nothing(tmp_path_factory, texts, size):
    folder = tmp_path_factory.mktemp("cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", size)
        assert read(write_json_lines(folder / "a.jsonl.gz", texts)) == texts
        joined = folder / "a.txt"
        joined.write_bytes("".join(text + "\0\0," for text in texts).encode())
        assert read(joined, separator="\0\0,") == "\0\0,".join(texts).split("\0\0,")


BAD_LINES = {
    b'{"text": "\xff"}': "not UTF-8: byte 0xff at position 10",
    b'{"text": "half': "not JSON: Unterminated string",
    b'{"body": "x"}': "expected an object with the field 'text', found body",
    b"[1]": "expected an object with the field 'text', found list",
    b'{"text": null}': "expected text, found NoneType",
    b'{"text": "\\ud800"}': "not Unicode: half a surrogate pair at position 0",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("piece_bytes", [1, 2**22])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=BAD_LINES.values())
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, monkeypatch, line, reason, piece_bytes):
    monkeypatch.setattr(sources, "PIECE_BYTES", max(piece_bytes, len(line) // 5))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n{"text": "2"}\n' + line + b'\n{"text": "4"}')
    first, second, rejected, fourth = read(path)
    assert (first, second, fourth) == ("1", "2", "4")
    assert rejected.startswith(f"{path}, line 3: {reason}")


def test_bad_text_elsewhere_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read(tmp_path / "a.txt") == [f"{tmp_path / 'a.txt'}, document 1: not UTF-8: byte 0xe9 at position 3"]
    assert read(tmp_path / "a.txt", separator="a")[1].startswith(f"{tmp_path / 'a.txt'}, document 2: not UTF-8")
    table = write_parquet(tmp_path / "a.parquet", ["x", "y", "z", None])
    assert read(table)[3] == f"{table}, row 4: expected text, found NoneType"


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESS if suffix])
def test_a_truncated_or_foreign_file_is_named_after_what_it_still_holds(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    path = write_json_lines(tmp_path / f"a.jsonl{compression}", ["x" * 1000] * 50)
    path.write_bytes(path.read_bytes()[:-5])
    *good, last = read(path)
    assert set(good) <= {"x" * 1000}
    assert last.startswith(f"{path}: cannot be read to its end: ")
    path.write_bytes(b"something else entirely")
    (only,) = read(path)
    assert only.startswith(f"{path}: cannot be read to its end: ")


def test_a_damaged_table_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x" * 500, "y" * 500, "z" * 500])
    content = path.read_bytes()
    start = parquet.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    path.write_bytes(content[:-30])
    (only,) = read(path)
    assert only.startswith(f"{path}: cannot be read to its end: ")
    path.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
    assert read(path)[0].startswith(f"{path}: row group 0 cannot be read: ")
    assert read(path)[1:] == ["z" * 500]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.xz", "a.parquet"])
def test_an_empty_file_is_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        write_parquet(path, [])
    else:
        path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](b""))
    assert read(path) == [f"{path}: empty"]


def test_what_is_not_there_is_named(tmp_path):
    for source, message in {
        tmp_path / "none.jsonl": "no such file or folder",
        "none/none.jsonl": "no such file or folder",
        tmp_path: r"no file matches '\*\*/\*'",
        tmp_path / "*.txt": "no file matches",
    }.items():
        with pytest.raises(DataError, match=message):
            read(source)
    path = write_parquet(tmp_path / "a.parquet", TEXTS, field="body")
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text', but id, body"):
        read(path)


def test_the_share_that_was_read_is_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 6)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text("12345\n" * 2)
        (tmp_path / name / "2.txt").write_text("12345\n")
    how = Reading(separator="\n")
    found = [piece.done for piece in pieces([find_source(str(tmp_path / name), how) for name in "ab"], how)]
    assert found == pytest.approx([n / 6 for n in range(1, 7)])


def test_datasets_of_the_hub_are_streamed(monkeypatch):
    rows = [{"body": text} for text in TEXTS]
    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.IterableDataset:
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "PIECE_BYTES", 30)
    assert find_source("owner/name", Reading()) == HubDataset("owner/name")
    assert read("owner/name", field="body", hub_config="small", hub_split="valid") == TEXTS
    assert asked == [(("owner/name", "small"), {"split": "valid", "streaming": True})]
    held = list(pieces([HubDataset("owner/name")], Reading("body")))
    assert len(held) > 2, "never the whole dataset at once"
    assert [piece.first for piece in held] == [1 + sum(len(p.content) for p in held[:n]) for n in range(len(held))]
    with pytest.raises(DataError, match="owner/name: no column 'text', but body"):
        read("owner/name")


def test_a_hub_out_of_reach_is_a_clear_error(monkeypatch):
    def load_dataset(*arguments: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="owner/name: no such file or folder; and as a dataset of the Hub: Couldn't"):
        read("owner/name")
