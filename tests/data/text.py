"""Small text in every format that sources can have."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
from backports import zstd
from hypothesis import strategies as st
from pyarrow import parquet

from m2rnn.data.prepare import Settings, prepare
from m2rnn.data.token_files import TokenDataset

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstd.compress,
}
TEXTS = ["one\ntwo\r\n", "", "ünï cødé 漢字 🎉", "a document with <|eos|> in it", "x" * 300, "\u2028 \0 end"]
# No lone surrogates: they are no text.
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=20)


def write_json_lines(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts))
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](lines.encode()))
    return path


def write_parquet(path: Path, texts: Sequence[str | None], field: str = "text", rows: int = 2) -> Path:
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), field: texts}), path, row_group_size=rows)
    return path


def prepared(folder: Path, texts: Sequence[str], overwrite: bool = False, **options: object) -> TokenDataset:
    """The training split of these texts."""
    source = write_json_lines(folder / "source.jsonl", texts)
    settings = Settings({"train": [str(source)]}, **options)  # type: ignore[arg-type]
    prepare(settings, folder / "tokens", processes=1, overwrite=overwrite)
    return TokenDataset(folder / "tokens")


def texts_of(data: TokenDataset) -> list[str]:
    """The documents of a byte-level split, which must each end with the only eos in them."""
    found = [bytes(data.document(number)) for number in range(data.num_documents)]
    assert all(document[-1] == data.eos_token_id and document.count(data.eos_token_id) == 1 for document in found)
    return [document[:-1].decode() for document in found]
