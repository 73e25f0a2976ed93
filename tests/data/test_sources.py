"""Every format gives the same documents, cut anywhere; what cannot be read is named with its place."""

import bz2
import json
import lzma
import random
import tracemalloc
import zlib
from pathlib import Path

import datasets
import pyarrow
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from m2rnn.data import sources, streams
from m2rnn.data.sources import DataError, HubDataset, Reading, Rejected, documents, find_source, pieces
from tests.data.text import COMPRESS, TEXTS, texts, write_json_lines, write_parquet

ARCHIVES = [suffix for suffix in COMPRESS if suffix]
DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".zst": zstd.ZstdDecompressor,
}
MARK = "\ufeff"


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


def decompressible(archives: bytes, compression: str, step: int) -> tuple[bytes, bool]:
    """All that the standard library's decompressors make of so many bytes at a time, and whether that is whole."""
    found, decompressor = b"", None
    for start in range(0, len(archives), step):
        left = archives[start : start + step]
        while left:
            decompressor = DECOMPRESSORS[compression]() if decompressor is None or decompressor.eof else decompressor
            try:
                found += decompressor.decompress(left)
            except Exception:
                return found, False
            left = decompressor.unused_data
    return found, decompressor is None or decompressor.eof


def lines_of(documents: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}).encode() + b"\n" for text in documents]


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def assert_cut_lines(path: Path, archives: bytes, documents: list[str], compression: str) -> None:
    """Kept is exactly every document whose line can be decompressed; the next line is named, once."""
    path.write_bytes(archives)
    found, whole = decompressible(archives, compression, max(1, len(archives)))
    kept, size = 0, 0
    for line in lines_of(documents):
        size += len(line)
        if size - 1 > len(found):  # an object is whole without the end of its line
            break
        kept += 1
    *read_documents, last = read(path)
    if not archives:
        assert (read_documents, last) == ([], f"{path}: empty")
    elif whole:
        assert [*read_documents, last] == documents[:kept]
    else:
        assert read_documents == documents[:kept]
        assert last.startswith(f"{path}, line {kept + 1}: cannot be read from here on: the file ends within ")


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1), min_size=1),
    st.sampled_from(ARCHIVES),
    st.floats(0, 1),
    st.integers(1, 300),
    st.integers(1, 100),
    st.integers(1, 100),
)
def test_of_a_cut_archive_every_whole_line_is_kept(tmp_path_factory, members, compression, cut, piece, inputs, outputs):
    archives = b"".join(COMPRESS[compression](b"".join(lines_of(member))) for member in members)
    everything = [text for member in members for text in member]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece)
        patch.setattr(streams, "INPUT_BYTES", inputs)
        patch.setattr(streams, "OUTPUT_BYTES", outputs)
        patch.setattr(streams, "BZIP2_OUTPUT_BYTES", outputs)
        path = tmp_path_factory.mktemp("cut") / f"a.jsonl{compression}"
        assert_cut_lines(path, archives[: round(cut * len(archives))], everything, compression)


@pytest.mark.parametrize("compression", ARCHIVES)
def test_of_a_large_cut_archive_every_whole_line_is_kept(tmp_path, compression):
    dice = random.Random(0)
    texts = [dice.randbytes(dice.randint(0, 400)).hex() for _ in range(1000)]  # several blocks, in any format
    compress = (lambda content: bz2.compress(content, 1)) if compression == ".bz2" else COMPRESS[compression]
    archive = compress(b"".join(lines_of(texts)))
    for cut in (1, 8, 9, *(dice.randint(1, len(archive) - 1) for _ in range(30))):
        assert_cut_lines(tmp_path / f"a.jsonl{compression}", archive[:-cut], texts, compression)


@settings(max_examples=60)
@given(st.sampled_from(ARCHIVES), st.integers(), st.integers(1, 255))
def test_before_a_damaged_byte_all_that_can_be_decompressed_is_kept(tmp_path_factory, compression, place, change):
    dice = random.Random(1)
    archive = bytearray(COMPRESS[compression](b"".join(lines_of([dice.randbytes(9).hex() for _ in range(200)]))))
    archive[place % len(archive)] ^= change
    path = tmp_path_factory.mktemp("damaged") / f"a.jsonl{compression}"
    path.write_bytes(archive)
    found, whole = decompressible(bytes(archive), compression, 1)
    end = found.rfind(b"\n") + 1
    cut_object = is_object(found[end:])  # whole without the end of its line
    end = len(found) if whole or cut_object else end
    plain = path.with_name("plain.jsonl")
    plain.write_bytes(found[:end])
    expected = [text.replace(str(plain), str(path)) for text in read(plain) if end]
    if not whole:
        *kept, last = read(path)
        assert kept == expected
        number = found.count(b"\n") + cut_object + 1
        assert last.startswith(f"{path}, line {number}: cannot be read from here on: ")
    else:
        assert read(path) == (expected or [f"{path}: empty"])


@pytest.mark.parametrize("compression", ARCHIVES)
def test_what_follows_an_archive_and_is_none_is_named_after_all_of_it(tmp_path, compression):
    path = write_json_lines(tmp_path / f"a.jsonl{compression}", TEXTS)
    whole = path.read_bytes()
    for padding in (b"", b"\0" * 8):
        for garbage in (b"no archive", whole[:1] + b"no archive"):
            path.write_bytes(whole + padding + garbage)
            *kept, last = read(path)
            assert kept == TEXTS
            assert last.startswith(f"{path}, line {len(TEXTS) + 1}: cannot be read from here on: ")
    path.write_bytes(whole + b"\0" * 8)
    assert read(path) == TEXTS
    for foreign in (b"something else entirely", b"\0" * 3):
        path.write_bytes(foreign)
        (only,) = read(path)
        assert only.startswith(f"{path}, line 1: cannot be read from here on: ")


def test_of_cut_text_files_whole_documents_are_kept(tmp_path):
    dice = random.Random(2)
    texts = [dice.randbytes(20).hex() for _ in range(100)]
    path = tmp_path / "a.txt.gz"
    archive = COMPRESS[".gz"]("|".join(texts).encode())
    path.write_bytes(archive[:-9])  # all of the text, but that is not known of its last document
    *kept, last = read(path, separator="|")
    assert kept == texts[:-1]
    assert last.startswith(f"{path}, document 100: cannot be read from here on: the file ends within compressed data")
    (only,) = read(path)
    assert only.startswith(f"{path}, document 1: cannot be read from here on: ")


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_little_memory_reads_any_archive(tmp_path, compression):
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](b'{"text": "again"}\n' * 2**22)[:-9])  # 72 MiB from some KB
    found = pieces([find_source(str(path), Reading())], Reading())
    tracemalloc.start()
    try:
        assert sum(piece.size for piece in found) > 2**26
        assert tracemalloc.get_traced_memory()[1] < 8 * sources.PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_a_damaged_table_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x" * 500, "y" * 500, "z" * 500])
    content = path.read_bytes()
    start = parquet.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    path.write_bytes(content[:-30])
    (only,) = read(path)
    assert only.startswith(f"{path}: cannot be read: ")
    path.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
    assert read(path)[0].startswith(f"{path}, row group 0, rows 1 to 2: cannot be read: ")
    assert read(path)[1:] == ["z" * 500]


def test_of_a_damaged_row_group_the_rows_before_are_kept_and_the_others_counted(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{number:03}" * 200 for number in range(30)]
    table = pyarrow.table({"text": texts})
    parquet.write_table(
        table, path, row_group_size=10, data_page_size=1, write_batch_size=1, use_dictionary=False, compression="gzip"
    )
    content = path.read_bytes()
    groups = parquet.ParquetFile(path).metadata
    starts = [groups.row_group(number).column(0).data_page_offset for number in range(3)]
    middle = starts[1] + 6 * (starts[2] - starts[1]) // 10  # the pages are of one size
    path.write_bytes(content[:middle] + b"\xff" * 30 + content[middle + 30 :])
    how = Reading()
    found = [document for piece in pieces([find_source(str(path), how)], how) for document in documents(piece, how)]
    (rejected,) = (document for document in found if isinstance(document, Rejected))
    kept = 30 - rejected.documents
    assert 10 < kept < 30
    assert found == [*texts[: kept - 10], rejected, *texts[20:]]
    assert str(rejected).startswith(f"{path}, row group 1, rows {kept - 9} to 20: cannot be read: ")


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_byte_order_mark_is_no_text_where_a_file_begins(tmp_path, monkeypatch, compression):
    compress = COMPRESS[compression]
    lines = b"".join(lines_of([f"{MARK}a", f"b{MARK}"]))
    for piece_bytes in (1, 2**22):
        monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(streams, "OUTPUT_BYTES", piece_bytes)
        path = tmp_path / f"a.jsonl{compression}"
        path.write_bytes(compress(MARK.encode() + lines))
        assert read(path) == [f"{MARK}a", f"b{MARK}"]
        path = tmp_path / f"a.txt{compression}"
        path.write_bytes(compress(f"{MARK}{MARK}a|{MARK}b|".encode()))
        assert read(path) == [f"{MARK}a|{MARK}b|"]
        assert read(path, separator="|") == [f"{MARK}a", f"{MARK}b"]
        for short in ("", "a", "ü"):
            path.write_bytes(compress(f"{MARK}{short}".encode()))
            assert read(path) == [short or f"{path}: empty"]
    table = write_parquet(tmp_path / "a.parquet", [f"{MARK}a"])
    assert read(table) == [f"{MARK}a"]


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_text_in_another_encoding_is_named_with_what_to_do(tmp_path, encoding, order, name):
    path = tmp_path / name
    text = f'{MARK}{{"text": "a"}}\n'.encode(f"{encoding}-{order}")
    path.write_bytes(COMPRESS[".gz"](text) if name.endswith(".gz") else text)
    (only,) = read(path)
    unit = "document" if name == "a.txt" else "line"
    convert = f"{encoding}, expected UTF-8: convert the file, for instance with iconv -f {encoding} -t UTF-8"
    assert only == f"{path}, {unit} 1: {convert}"


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
    monkeypatch.setattr(streams, "OUTPUT_BYTES", 6)
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


def test_a_hub_that_is_lost_within_a_dataset_is_named_with_the_row(monkeypatch):
    def rows():
        yield from ({"text": text} for text in ("1", "2"))
        raise ConnectionError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    for piece_bytes in (1, 2**22):
        monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
        with pytest.raises(DataError, match=r"owner/name, row 3: cannot be read: connection reset\. The same command"):
            read("owner/name")
