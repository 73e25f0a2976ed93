"""A folder of token files, as ``m2rnn prepare`` writes it, opened for reading.

    manifest.json           what the folder holds; written last: without it nothing here is whole
    tokenizer/              the tokenizer, for ``AutoTokenizer.from_pretrained``
    train.tokens.bin        the ids of all documents, end to end; uint8, uint16 or uint32, little-endian
    train.tokens.crc32      CRC-32 of each 64 KiB of them, uint32, little-endian
    train.documents.bin     where each document ends in them, int64, little-endian

and likewise ``valid`` and ``test``. A document is its text's ids, then the id ``eos``.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m2rnn.data.sources import DataError
from m2rnn.data.tokenizers import TOKENIZER_FILE, load_tokenizer, set_bos, tokenizer_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "m2rnn tokens 2"
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
SPLITS = ("train", "valid", "test")
ENDS, CHECKSUMS = np.dtype("<i8"), np.dtype("<u4")
PIECE = 1 << 16  # bytes with a checksum of their own: what a disk reads at once, more or less
MEND = "copy the folder again, or prepare it anew (--overwrite)"


def tokens_name(split: str) -> str:
    return f"{split}.tokens.bin"


def checksums_name(split: str) -> str:
    return f"{split}.tokens.crc32"


def documents_name(split: str) -> str:
    return f"{split}.documents.bin"


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(path: Path) -> NDArray[np.uint32]:
    """The CRC-32 of each piece of a file."""
    with path.open("rb") as file:
        return np.array([zlib.crc32(piece) for piece in iter(lambda: file.read(PIECE), b"")], CHECKSUMS)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What ``manifest.json`` says.

    Raises:
        DataError: if there is none, or it is damaged or of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except FileNotFoundError:
        raise DataError(f"{folder} holds no finished token files: make them with m2rnn prepare") from None
    except NotADirectoryError:
        raise DataError(f"{folder} is a file: give the folder that m2rnn prepare made") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): {MEND}") from None
    if found != FORMAT:
        raise DataError(f"{path} has the format {found!r}, not {FORMAT!r}: prepare the folder anew (--overwrite)")
    assert isinstance(manifest, dict)
    return manifest


class TokenDataset:
    """The documents of one split of a folder of token files, read where they lie on disk.

    Args:
        folder: what ``m2rnn prepare`` made.
        split: ``"train"``, ``"valid"`` or ``"test"``.

    Attributes:
        tokens: the ids of all documents, ``[num_tokens]``; a view of the file.
        ends: index after the last token of each document, int64 ``[num_documents]``; a view of the file.
        vocab_size, eos_token_id, pad_token_id: of the tokenizer; eos stands in for a missing pad.
        tokenizer_hash: see ``tokenizers.tokenizer_hash``.
        num_bytes: of all texts in UTF-8.
        manifest: everything else.

    Raises:
        DataError: naming the file, if one is missing, has not the size that the manifest says, or if ``ends`` differ
            from what was written. Tokens are compared by ``read``; ``verify`` compares every byte.
    """

    def __init__(self, folder: str | Path, split: str = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(folder)
        try:
            if split not in self.manifest["splits"]:
                raise DataError(f"{folder} has no split {split!r}, but {', '.join(self.manifest['splits'])}")
            described = self.manifest["splits"][split]
            self.num_tokens: int = described["tokens"]
            self.num_documents: int = described["documents"]
            self.num_bytes: int = described["bytes"]
            documents_hash: str = described["documents_sha256"]
            tokenizer = self.manifest["tokenizer"]
            self.vocab_size: int = tokenizer["vocab_size"]
            self.eos_token_id: int = tokenizer["eos_token_id"]
            pad = tokenizer["pad_token_id"]
            self.pad_token_id: int = self.eos_token_id if pad is None else pad
            self.tokenizer_hash: str = tokenizer["sha256"]
            dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.folder / MANIFEST} is damaged ({error!r}): {MEND}") from None
        self.tokens = self._open(self.tokens_path, dtype, self.num_tokens)
        self.ends = self._open(self.documents_path, ENDS, self.num_documents)
        checked = self.folder / checksums_name(split)
        self._checksums = self._open(checked, CHECKSUMS, -(-self.tokens.nbytes // PIECE))
        self._is_checked = np.zeros(len(self._checksums), bool)
        if file_hash(self.documents_path) != documents_hash:
            raise self._damaged(self.documents_path)

    @property
    def tokens_path(self) -> Path:
        return self.folder / tokens_name(self.split)

    @property
    def documents_path(self) -> Path:
        return self.folder / documents_name(self.split)

    def __repr__(self) -> str:
        return f"TokenDataset({str(self.folder)!r}, {self.split!r}): {self.num_documents:,} documents"

    # Opened again where it is unpickled: a data loader's processes would otherwise get a copy of the files.
    def __reduce__(self) -> tuple[type["TokenDataset"], tuple[Path, str]]:
        return TokenDataset, (self.folder, self.split)

    def document(self, number: int) -> NDArray[Any]:
        """The ids of a document, eos included; a view of the file."""
        start = int(self.ends[number - 1]) if number else 0
        return self.tokens[start : int(self.ends[number])]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """``tokens[start:stop]``, whose checksums are compared when they are first read.

        Raises:
            DataError: if the file was damaged there.
        """
        size = self.tokens.itemsize
        for piece in range(start * size // PIECE, -(-stop * size // PIECE)):
            if not self._is_checked[piece]:
                content = self.tokens[piece * PIECE // size : (piece + 1) * PIECE // size]
                if zlib.crc32(content.data) != self._checksums[piece]:
                    raise self._damaged(self.tokens_path)
                self._is_checked[piece] = True
        return self.tokens[start:stop]

    def document_at(self, token: int) -> int:
        """The number of the document that holds this token."""
        return int(np.searchsorted(self.ends, token, side="right"))

    def verify(self, progress: Callable[[str], None] = lambda text: None) -> None:
        """Read everything and compare it with the manifest.

        Raises:
            DataError: naming the file that differs.
        """
        progress(f"reading {self.tokens_path}")
        if file_hash(self.tokens_path) != self.manifest["splits"][self.split]["tokens_sha256"]:
            raise self._damaged(self.tokens_path)
        try:
            whole = self._is_made_by(self.folder / TOKENIZER)
        except (OSError, DataError) as error:
            raise self._damaged(self.folder / TOKENIZER) from error
        if not whole:
            raise self._damaged(self.folder / TOKENIZER)

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that made the tokens; it begins texts with bos if the documents begin so.

        Raises:
            DataError: if another one has taken its place.
        """
        tokenizer = load_tokenizer(self.folder / TOKENIZER)
        self.check_tokenizer(tokenizer, f"the tokenizer in {self.folder / TOKENIZER}")
        set_bos(tokenizer, bool(self.manifest.get("bos")))  # an earlier version left the tokenizer as it was
        return tokenizer

    def _is_made_by(self, tokenizer: "PreTrainedTokenizerBase | Path | str") -> bool:
        return self.tokenizer_hash in (tokenizer_hash(tokenizer), tokenizer_hash(tokenizer, with_template=True))

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase | Path | str", name: str | None = None) -> None:
        """Refuse a tokenizer (or a folder with one) whose ids are not those of the tokens."""
        own = self.folder / TOKENIZER
        # A model may have the tokenizer with another template: it is compared with the folder's own, not the manifest.
        like_own = (own / TOKENIZER_FILE).exists() and tokenizer_hash(tokenizer) == tokenizer_hash(own)
        if not self._is_made_by(tokenizer) and not (like_own and self._is_made_by(own)):
            made_by = self.manifest["tokenizer"]["name"]
            raise DataError(
                f"{name or tokenizer} is not the tokenizer that made {self.folder} ({made_by}, "
                f"{self.vocab_size:,} ids): use the one in {self.folder / TOKENIZER}, or prepare the text anew"
            )

    def _open(self, path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        expected = count * dtype.itemsize
        try:
            size = path.stat().st_size
            if size != expected:
                raise DataError(f"{path} has {size:,} bytes, not {expected:,} as in {MANIFEST}: {MEND}")
            return np.memmap(path, dtype, mode="r")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}: {MEND}") from None

    def _damaged(self, path: Path) -> DataError:
        return DataError(f"{path} is not what m2rnn prepare wrote: {MEND}")
