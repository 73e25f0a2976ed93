"""The bytes of a file of text, decompressed: all of them, or all before the place where the file is damaged."""

import bz2
import codecs
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import FileIO
from typing import Any

INPUT_BYTES = 2**16
OUTPUT_BYTES = 2**20  # at once: a few bytes of a file may stand for gigabytes
# All of a block of bzip2, whose checksum follows its text: text that has another is none. The largest has 46 MB.
BZIP2_OUTPUT_BYTES = 2**26
MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins as UTF-16's does: first
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class ByteStream:
    """The bytes of a file of text, without the byte-order mark of UTF-8 that may begin it.

    A file that is damaged or in another encoding ends where it cannot be read: ``damage`` then says why.

    Args:
        parts: the bytes of the file, of any number at a time; an error where it is damaged.
    """

    def __init__(self, parts: Iterator[bytes]) -> None:
        self.damage: str | None = None
        self._parts = parts
        self._held = bytearray()
        self._fill(len(codecs.BOM_UTF32_LE))
        foreign = foreign_encoding(self._held)
        if foreign is not None:
            self.damage, self._parts = foreign, iter(())
            self._held.clear()
        elif self._held.startswith(codecs.BOM_UTF8):
            del self._held[: len(codecs.BOM_UTF8)]

    def read(self, size: int | None = None) -> bytes:
        """The next bytes: as many as asked for, or all; fewer only where the file ends or is damaged."""
        self._fill(size)
        content = bytes(self._held[:size])
        del self._held[:size]
        return content

    def _fill(self, size: int | None) -> None:
        try:
            while size is None or len(self._held) < size:
                self._held += next(self._parts)
        except StopIteration:
            pass
        except Exception as error:  # every format has its own, without a common class
            self.damage = f"cannot be read from here on: {error}"


def foreign_encoding(start: bytes | bytearray) -> str | None:
    """What is wrong with a file that starts so, if its byte-order mark is of another encoding than UTF-8."""
    for mark, name in MARKS:
        if start.startswith(mark):
            return f"{name}, expected UTF-8: convert the file, for instance with iconv -f {name} -t UTF-8"
    return None


def why_not_utf8(error: UnicodeDecodeError) -> str:
    """For users, why a whole file is not UTF-8."""
    return foreign_encoding(error.object) or f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"


def plain(file: FileIO) -> Iterator[bytes]:
    """The bytes of a file that is not compressed."""
    return iter(partial(file.read, OUTPUT_BYTES), b"")


def decompressed(file: FileIO, compression: str) -> Iterator[bytes]:
    """What a file holds that is compressed as its suffix says: archives end to end, perhaps with zeros between them.

    Whatever can be decompressed comes before the error that says what is wrong with the rest.

    Raises:
        ImportError: at once, for want of the package for ``.zst``.
    """
    new: Callable[[], Any]
    if compression == ".zst":
        from backports import zstd

        new = zstd.ZstdDecompressor
    else:
        new = DECOMPRESSORS[compression]
    return _with_all_before_damage(file, new, BZIP2_OUTPUT_BYTES if compression == ".bz2" else OUTPUT_BYTES)


def _with_all_before_damage(file: FileIO, new: Callable[[], Any], most: int) -> Iterator[bytes]:
    given = 0
    try:
        for part in _members(file, new, most):
            yield part
            given += len(part)
    except EOFError:
        raise
    except Exception:  # every format has its own
        # A decompressor keeps to itself what it had made of its input when it failed. So again, and that input a byte
        # at a time, up to the same error.
        single = file.tell() - INPUT_BYTES
        file.seek(0)
        for part in _members(file, new, most, single):
            yield part[given:]
            given -= min(given, len(part))


def _members(file: FileIO, new: Callable[[], Any], most: int, single: float = float("inf")) -> Iterator[bytes]:
    """The contents of the archives in a file. From position ``single`` on it is read a byte at a time."""
    decompressor, members = None, 0
    while data := file.read(INPUT_BYTES if file.tell() < single else 1):
        while data:
            if decompressor is None:
                if members and not (data := data.lstrip(b"\0")):
                    break
                decompressor = new()
                members += 1
            part = decompressor.decompress(data, most)
            yield part
            # needs_input is no help: bz2 asks for more while it has text to give.
            while len(part) == most and not decompressor.eof:
                part = decompressor.decompress(b"", most)
                yield part
            data = b""
            if decompressor.eof:
                data, decompressor = decompressor.unused_data, None
    if decompressor is not None:
        raise EOFError("the file ends within compressed data: it was cut off")


class _Gunzip:
    """zlib's decompressor with the methods of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # with gzip's header and checksum

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, most)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


# What makes a decompressor for one archive. That for .zst may be missing.
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": _Gunzip,
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
}
COMPRESSIONS = (*DECOMPRESSORS, ".zst")
