"""Held-out documents that the training text does not repeat: documentation copies whole paragraphs from page to page.

    python benchmarks/unseen_documents.py TRAIN HELD_OUT [HELD_OUT ...] --out unseen.jsonl

A document's share of known text is that of its lines of 60 characters and more, in characters, that stand in the
training text word for word. Writes those documents whose share is a tenth at most, as JSON lines, and none without such
lines; prints how many of each share there are. TRAIN and HELD_OUT are what `m2rnn prepare` takes.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from m2rnn.data.sources import DataError, Reading, documents, find_source, pieces
from m2rnn.runs.folder import write_whole_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="the training text")
    parser.add_argument("held_out", nargs="+", help="text to choose from")
    parser.add_argument("--most", type=float, default=0.1, help="share of known text (default: %(default)s)")
    parser.add_argument("--line", type=int, default=60, help="characters of the shortest line (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("unseen.jsonl"))
    arguments = parser.parse_args()
    try:
        held_out = list(texts(arguments.held_out))
        wanted = {line for text in held_out for line in long_lines(text, arguments.line)}
        known: set[str] = set()
        for text in texts([arguments.train]):
            known.update(wanted.intersection(long_lines(text, arguments.line)))
    except DataError as error:
        sys.exit(str(error))
    shares = [known_share(text, known, arguments.line) for text in held_out]
    kept = [text for text, share in zip(held_out, shares, strict=True) if share is not None and share <= arguments.most]
    write_whole_file(arguments.out, "".join(json.dumps({"text": text}) + "\n" for text in kept).encode())
    print(f"{len(known):,} of {len(wanted):,} long lines stand in the training text")
    print("known share   documents   characters")
    count, size = Counter[str](), Counter[str]()
    for text, share in zip(held_out, shares, strict=True):
        count[named(share)] += 1
        size[named(share)] += len(text)
    for name in sorted(count):
        print(f"{name:<14}{count[name]:>9,}{size[name]:>13,}")
    print(f"{len(kept):,} documents of {sum(map(len, kept)):,} characters: {arguments.out}")


def texts(sources: list[str]) -> Iterator[str]:
    reading = Reading()
    for piece in pieces([find_source(source, reading) for source in sources], reading):
        for text in documents(piece, reading):
            if isinstance(text, str):
                yield text
            else:
                print(text, file=sys.stderr)


def long_lines(text: str, shortest: int) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= shortest]


def known_share(text: str, known: set[str], shortest: int) -> float | None:
    """None for a document without long lines, of which nothing can be told."""
    lines = long_lines(text, shortest)
    total = sum(map(len, lines))
    return sum(len(line) for line in lines if line in known) / total if total else None


def named(share: float | None) -> str:
    if share is None:
        return "no long lines"
    return "none" if share == 0 else f"up to {int(-(-share * 100 // 10)) * 10:3d} %"


if __name__ == "__main__":
    main()
