"""Where text comes from: files of several formats, folders of them, datasets of the Hugging Face Hub.

A source is read once and in order, as pieces: some lines of a file, a whole file, a row group. To cut pieces is
cheap and the work of one process; to parse them into documents is the work of many.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from m2rnn.data.streams import COMPRESSIONS, ByteStream, decompressed, plain

PIECE_BYTES = 2**22
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
WILDCARDS = frozenset("*?[")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Kind = Literal["json lines", "separated", "document", "row group", "rows", "damage"]


class DataError(ValueError):
    """Text or token files that cannot be used: the message names the file, the place, and what to do."""


@dataclass(frozen=True)
class Reading:
    """How to find documents in the sources.

    Attributes:
        field: of JSON objects and of the columns of tables, the one that holds the text.
        glob: which files of a folder to read; hidden ones never.
        separator: what ends a document in text files; None for one document a file.
        hub_config, hub_split: which part of a dataset of the Hub.
    """

    field: str = "text"
    glob: str = "**/*"
    separator: str | None = None
    hub_config: str | None = None
    hub_split: str = "train"


@dataclass(frozen=True)
class Files:
    """The files of one source, in the order they are read in."""

    source: str
    paths: Sequence[Path]


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, streamed."""

    source: str


@dataclass(frozen=True)
class Piece:
    """A part of a source that holds whole documents.

    Attributes:
        origin: the file or dataset, for messages.
        kind: what ``content`` is: bytes of JSON lines; bytes of text with separators; bytes of one document;
            the number of a row group of the file and how many rows it has; rows already read; what is rejected of a
            file that cannot be read, or not to its end.
        first: number of the piece's first line, document or row in its file, from 1 on.
        size: bytes to parse, roughly.
        done: how much of all sources was read up to here, from 0 to 1; None if nobody knows.
    """

    origin: str
    kind: Kind
    content: Any
    first: int
    size: int
    done: float | None = None


@dataclass(frozen=True)
class Rejected:
    """Something that holds no usable text: where, why, and how many documents that is; 1 if nobody knows."""

    place: str
    reason: str
    documents: int = 1

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def find_source(source: str, reading: Reading) -> Files | HubDataset:
    """The files or the dataset that ``source`` names.

    Raises:
        DataError: if there is nothing of that name, or no file in the folder.
    """
    path = Path(source)
    if path.is_file():
        return Files(source, [path])
    if path.is_dir():
        return Files(source, _files_below(path, reading.glob))
    if WILDCARDS & set(source):
        fixed = next(number for number, part in enumerate(path.parts) if WILDCARDS & set(part))
        return Files(source, _files_below(Path(*path.parts[:fixed]), str(Path(*path.parts[fixed:]))))
    if HUB_NAME.fullmatch(source) and not any(_format_of(path)):
        return HubDataset(source)
    raise DataError(f"{source}: no such file or folder, and no dataset of the Hub, which is OWNER/NAME")


def _files_below(folder: Path, pattern: str) -> list[Path]:
    try:
        matches = [path for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise DataError(f"glob {pattern!r}: {error}") from None
    visible = [path for path in matches if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not visible:
        raise DataError(f"{folder}: no file matches {pattern!r}")
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def pieces(sources: Sequence[Files | HubDataset], reading: Reading) -> Iterator[Piece]:
    """Everything the sources hold, in order. A file that is empty or damaged gives a piece that says so."""
    sizes = [path.stat().st_size for source in sources if isinstance(source, Files) for path in source.paths]
    total = sum(sizes) if all(isinstance(source, Files) for source in sources) else 0
    before = 0
    for source in sources:
        if isinstance(source, HubDataset):
            yield from _hub_pieces(source.source, reading)
            continue
        for path in source.paths:
            size = path.stat().st_size
            for piece, share in _file_pieces(path, size, reading):
                yield replace(piece, done=(before + share * size) / total if total else None)
            before += size


def _file_pieces(path: Path, size: int, reading: Reading) -> Iterator[tuple[Piece, float]]:
    """The pieces of a file, each with the share of the file that was read up to its end."""
    form, compression = _format_of(path)
    empty, damage = True, None
    try:
        if form == PARQUET:
            for found in _row_groups(path, reading):
                yield found
                empty = False
        else:
            kind, end = _lines_of(form, reading)
            first = 1
            with path.open("rb", buffering=0) as file:
                stream = _stream(file, path, compression)
                for content in _cut(stream, end):
                    if stream.damage is not None and not _is_whole(content, kind, end):
                        break
                    yield Piece(str(path), kind, content, first, len(content)), min(1, file.tell() / max(1, size))
                    first += 1 if end is None else content.count(end) + (not content.endswith(end))
                    empty = False
            if stream.damage is not None:
                unit = "line" if kind == "json lines" else "document"
                damage = Rejected(f"{path}, {unit} {first}", stream.damage)
        if empty and damage is None:
            damage = Rejected(str(path), "empty")
    except DataError:
        raise
    except Exception as error:  # of the system or of Arrow, which has several
        damage = Rejected(str(path), f"cannot be read: {error}")
    if damage is not None:
        yield Piece(str(path), "damage", damage, 1, 0), 1


def _stream(file: FileIO, path: Path, compression: str) -> ByteStream:
    if not compression:
        return ByteStream(plain(file))
    try:
        return ByteStream(decompressed(file, compression))
    except ImportError:
        raise DataError(f"{path}: to read .zst files, install m2rnn[train] or the package backports.zstd") from None


def _is_whole(content: bytes, kind: Kind, end: bytes | None) -> bool:
    """Whether content just before damage ends where a document does."""
    if end is not None and content.endswith(end):
        return True
    if kind != "json lines":
        return False
    try:  # an object that was cut is none
        return isinstance(json.loads(content[content.rfind(b"\n") + 1 :]), dict)
    except (ValueError, RecursionError):
        return False


def _format_of(path: Path) -> tuple[str, str]:
    """The suffixes that say what a file holds and how it is compressed; '' for text and for no compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes and suffixes[-1] in (*JSON_LINES, PARQUET) else ""), compression


def _lines_of(form: str, reading: Reading) -> tuple[Kind, bytes | None]:
    """What the pieces of a file are, and what each of its documents ends with."""
    if form in JSON_LINES:
        return "json lines", b"\n"
    if reading.separator is not None:
        return "separated", reading.separator.encode()
    return "document", None


def _cut(stream: ByteStream, end: bytes | None) -> Iterator[bytes]:
    """The stream in pieces that each end with ``end``, except perhaps the last; whole without an ``end``."""
    if end is None:
        whole = stream.read()
        if whole:
            yield whole
        return
    held = bytearray()
    while chunk := stream.read(PIECE_BYTES):
        unseen = max(0, len(held) - len(end) + 1)
        held += chunk
        found = held.rfind(end, unseen)
        if found >= 0:
            yield bytes(held[: found + len(end)])
            del held[: found + len(end)]
    if held:
        yield bytes(held)


def _row_groups(path: Path, reading: Reading) -> Iterator[tuple[Piece, float]]:
    with _parquet(path).ParquetFile(path) as table:
        _check_column(str(path), table.schema_arrow.names, reading.field)
        first = 1
        for group in range(table.metadata.num_row_groups):
            described = table.metadata.row_group(group)
            if not described.num_rows:
                continue
            columns = (described.column(n) for n in range(described.num_columns))
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == reading.field)
            rows = described.num_rows
            piece = Piece(str(path), "row group", (group, rows), first, size)
            yield piece, (group + 1) / table.metadata.num_row_groups
            first += rows


def _rows(piece: Piece, field: str) -> Iterator[bytes | Rejected | None]:
    """The rows of a row group, or those before its damage and what is rejected."""
    group, rows = piece.content
    try:
        column: list[bytes | None] = _read_row_group(piece.origin, group, field)
    except Exception as error:  # of Arrow, which has several
        damage = str(error)
    else:
        yield from column
        return
    read = 0
    try:
        for row in _read_row_by_row(piece.origin, group, field):
            yield row
            read += 1
    except Exception as error:
        damage = str(error)
    if read < rows:
        place = f"{piece.origin}, row group {group}, rows {piece.first + read:,} to {piece.first + rows - 1:,}"
        yield Rejected(place, f"cannot be read: {damage}", rows - read)


def _read_row_group(path: str, group: int, field: str) -> list[bytes | None]:
    with _parquet(path).ParquetFile(path) as table:
        column = table.read_row_group(group, columns=[field]).column(field)
        rows: list[bytes | None] = column.cast("large_binary").to_pylist()
        return rows


def _read_row_by_row(path: str, group: int, field: str) -> Iterator[bytes | None]:
    """Slow: every page that can be read is, before the error that says which cannot."""
    with _parquet(path).ParquetFile(path, pre_buffer=False) as table:
        for batch in table.iter_batches(1, row_groups=[group], columns=[field], use_threads=False):
            yield from batch.column(0).cast("large_binary").to_pylist()


def _parquet(path: Path | str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: to read Parquet, install m2rnn[train] or the package pyarrow") from None
    return parquet


def _check_column(origin: str, names: Sequence[str] | None, field: str) -> None:
    if names is not None and field not in names:
        raise DataError(f"{origin}: no column {field!r}, but {', '.join(names)}; name the one that holds the text")


def _hub_pieces(name: str, reading: Reading) -> Iterator[Piece]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name}: to read datasets of the Hub, install m2rnn[train] or the package datasets") from None
    first, size = 1, 0
    held: list[Any] = []
    try:
        rows = load_dataset(name, reading.hub_config, split=reading.hub_split, streaming=True)
        _check_column(name, rows.column_names, reading.field)
        for row in rows:
            held.append(row.get(reading.field))
            size += len(str(held[-1]))
            if size >= PIECE_BYTES:
                yield Piece(name, "rows", held, first, size)
                first, size, held = first + len(held), 0, []
    except DataError:
        raise
    except Exception as error:  # of the network, the Hub, or one of many formats
        if held or first > 1:
            raise DataError(
                f"{name}, row {first + len(held):,}: cannot be read: {error}. The same command goes on with the dataset"
            ) from error
        raise DataError(f"{name}: no such file or folder; and as a dataset of the Hub: {error}") from error
    if held:
        yield Piece(name, "rows", held, first, size)
    elif first == 1:
        yield Piece(name, "damage", Rejected(name, "empty"), 1, 0)


def documents(piece: Piece, reading: Reading) -> Iterator[str | Rejected]:
    """The texts of a piece, in order, and what stands in the place of those that cannot be used."""
    contents: Iterable[Any]
    unit, parse = "row", _text
    match piece.kind:
        case "damage":
            yield piece.content
            return
        case "document":
            unit, contents = "document", [piece.content]
        case "separated":
            assert reading.separator is not None
            end = reading.separator.encode()
            unit, contents = "document", piece.content.removesuffix(end).split(end)
        case "json lines":
            unit, contents = "line", piece.content.removesuffix(b"\n").split(b"\n")
            parse = partial(_json_text, field=reading.field)
        case "rows":
            contents = piece.content
        case "row group":
            contents = _rows(piece, reading.field)
    for number, content in enumerate(contents, piece.first):
        if isinstance(content, Rejected):
            yield content
            continue
        try:
            text = parse(content)
        except _UnusableError as error:
            yield Rejected(f"{piece.origin}, {unit} {number}", str(error))
        else:
            yield text


class _UnusableError(Exception):
    """Why there is no text in something that should hold one."""


def _text(content: Any) -> str:
    try:
        if isinstance(content, bytes):
            return content.decode()
        if isinstance(content, str):
            content.encode()  # JSON's escapes can write halves of surrogate pairs, which UTF-8 cannot
            return content
    except UnicodeDecodeError as error:
        raise _UnusableError(f"not UTF-8: byte 0x{content[error.start]:02x} at position {error.start}") from None
    except UnicodeEncodeError as error:
        raise _UnusableError(f"not Unicode: half a surrogate pair at position {error.start}") from None
    raise _UnusableError(f"expected text, found {type(content).__name__}")


def _json_text(line: bytes, field: str) -> str:
    if not line or line.isspace():
        return ""
    try:
        content = json.loads(_text(line))
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"not JSON: {error}") from None
    if not isinstance(content, dict) or field not in content:
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise _UnusableError(f"expected an object with the field {field!r}, found {found or 'an empty one'}")
    return _text(content[field])
