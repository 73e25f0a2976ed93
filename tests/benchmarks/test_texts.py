"""The texts of the campaign: no near-copies, nothing held out stands in training, and the same bytes everywhere."""

import gzip
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "texts"
sys.path.append(str(FOLDER))  # a script finds what lies beside it

import python_sources  # noqa: E402
from python_sources import Sdist  # noqa: E402
from split import (  # noqa: E402
    Document,
    HeldOut,
    TextError,
    long_lines,
    share,
    split,
    without_near_copies,
    write_texts,
)

import docs  # noqa: E402

HELD_OUT = HeldOut(long=3, long_bytes=4000, ordinary=5, fewest_long=1)


def prose(words: random.Random, lines: int) -> list[str]:
    return [" ".join(f"word{words.randrange(10**6)}" for _ in range(9)) for _ in range(lines)]


def some_documents() -> list[Document]:
    """100 documents of 10 lines and 8 of 60, of which every third repeats three lines of the one before."""
    words = random.Random(0)
    made: list[list[str]] = []
    for number in range(108):
        lines = prose(words, 60 if number % 13 == 0 else 10)
        if number % 3 == 2:
            lines[:3] = made[-1][:3]
        made.append(lines)
    return [Document(str(number), "\n".join(lines)) for number, lines in enumerate(made)]


def test_copies_and_near_copies_go_whatever_the_width_of_tables():
    lines = prose(random.Random(1), 10)
    text = "\n".join(lines)
    wide = "\n".join(line.replace(" ", "   ") for line in lines)
    mostly = "\n".join(lines[:6] + prose(random.Random(2), 4))
    partly = "\n".join(lines[:3] + prose(random.Random(3), 7))
    short = Document("short", "a line\nof nothing long")

    def kept(*texts):
        return len(without_near_copies([Document(str(number), text) for number, text in enumerate(texts)]))

    assert kept(text, text) == kept(text, wide) == kept(text, mostly) == 1
    assert kept(text, partly) == 2
    assert without_near_copies([short, short]) == [short]


def test_nothing_held_out_stands_in_the_training_text():
    train, valid = split(some_documents(), HELD_OUT)
    assert len(train) > 50
    assert len(valid) >= 3
    assert not {document.text for document in train} & {document.text for document in valid}
    for these, those in ((train, valid), (valid, train)):
        known = {line for document in those for line in long_lines(document.text)}
        assert max(share(long_lines(document.text), known) for document in these) <= 0.1


def test_the_split_does_not_depend_on_the_order_of_the_documents():
    documents = some_documents()
    assert split(documents, HELD_OUT) == split(documents[::-1], HELD_OUT)


def test_long_documents_are_held_out_or_their_lack_is_an_error():
    _, valid = split(some_documents(), HELD_OUT)
    assert 1 <= sum(len(document.text) >= 4000 for document in valid) <= 3
    with pytest.raises(TextError, match="0 of 0 held-out documents of 99,000 bytes"):
        split(some_documents(), HeldOut(long=3, long_bytes=99_000, ordinary=5, fewest_long=1))


def test_texts_other_than_the_locked_ones_are_refused(tmp_path, capsys):
    lock, out = tmp_path / "texts.lock", tmp_path / "out"
    documents = some_documents()
    with pytest.raises(TextError, match=r"texts\.lock expects"):
        write_texts("small", documents, HELD_OUT, out, update_lock=False, lock=lock)
    assert not out.exists()
    write_texts("small", documents, HELD_OUT, out, update_lock=True, lock=lock)
    write_texts("small", documents, HELD_OUT, out, update_lock=False, lock=lock)
    content = (out / "train.jsonl").read_bytes()
    locked = json.loads(lock.read_bytes())["small"]["train"]
    assert locked["sha256"] == hashlib.sha256(content).hexdigest()
    assert locked["documents"] == len(content.splitlines())
    assert "m2rnn prepare" in capsys.readouterr().out
    with pytest.raises(TextError, match="Nothing is written"):
        write_texts("small", documents[1:], HELD_OUT, out, update_lock=False, lock=lock)
    assert (out / "train.jsonl").read_bytes() == content


def test_the_locks_name_both_corpora_and_pin_every_source_once():
    locked = json.loads((FOLDER / "texts.lock").read_bytes())
    assert {corpus: set(splits) for corpus, splits in locked.items()} == {
        "docs": {"train", "valid"},
        "code": {"train", "valid"},
    }
    sdists = python_sources.read_lock(FOLDER / "python-sources.lock")
    assert len({sdist.name for sdist in sdists}) == len(sdists) >= 60
    assert all(len(sdist.sha256) == 64 and sdist.file.endswith(".tar.gz") for sdist in sdists)


def packed(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"thing-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def pinned(content: bytes) -> Sdist:
    return Sdist("thing", "1.0", "MIT", "thing-1.0.tar.gz", hashlib.sha256(content).hexdigest())


def test_of_a_source_distribution_only_what_people_wrote_is_read():
    code = b"def double(x):\r\n    return x + x\r\n" * 40
    content = packed(
        {
            "thing/code.py": code,
            "thing/_vendor/other.py": code,
            "thing/tests/test_code.py": code,
            "thing/README.md": code,
            "thing/tiny.py": b"x = 1\n",
            "thing/parser.py": b"# Generated by a tool\n" + code,
            "thing/table.py": b"T = [\n" + b"    0.123456789, 1.23456789,\n" * 100 + b"]\n",
            "thing/line.py": b"x = '" + b"a" * 2000 + b"'\n",
            "thing/latin.py": "# é\n".encode("latin-1") + code,
        }
    )
    assert list(python_sources.documents(pinned(content), content)) == [
        Document("thing/thing/code.py", code.decode().replace("\r\n", "\n"))
    ]


def test_a_damaged_source_distribution_is_an_error(tmp_path):
    content = packed({"thing/code.py": b"x = 1\n" * 1000})
    sdist = pinned(content)
    (tmp_path / sdist.file).write_bytes(content[:-9])
    with pytest.raises(TextError, match=r"expected SHA-256 .* remove it, to download it again"):
        python_sources.archive(sdist, tmp_path, "nowhere")
    for damaged in (gzip.compress(b"no archive"), content[: len(content) // 2]):
        with pytest.raises(TextError, match=r"thing-1\.0\.tar\.gz is damaged"):
            list(python_sources.documents(sdist, damaged))


def test_a_source_distribution_comes_from_the_index_once(tmp_path):
    content = packed({"thing/code.py": b"x = 1\n"})
    sdist = pinned(content)
    page = tmp_path / "index" / "thing"
    page.mkdir(parents=True)
    (tmp_path / sdist.file).write_bytes(content)
    link = (tmp_path / sdist.file).as_uri()
    # A page of an index is what its address gives; here that is a file in a folder of its name.
    download = {f"{page.as_uri()}/": f'<a href="{link}#sha256=00">{sdist.file}</a>'.encode(), link: content}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_sources, "download", download.pop)
        index = page.parent.as_uri()
        assert python_sources.archive(sdist, tmp_path / "cache", index) == content
        assert python_sources.archive(sdist, tmp_path / "cache", index) == content
    assert not download


def test_markdown_is_read_from_the_commit_without_front_matter(tmp_path, monkeypatch):
    clone = tmp_path / "thing"
    (clone / "docs").mkdir(parents=True)
    text = "# Title\n\n" + "A sentence about it. " * 100
    (clone / "docs" / "page.md").write_bytes(b"---\r\ntitle: Page\r\n---\r\n\r\n\r\n" + text.encode())
    (clone / "docs" / "short.md").write_text("# Links")
    git = ["git", "-C", str(clone), "-c", "user.name=n", "-c", "user.email=e", "-c", "core.autocrlf=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    repository = docs.Repository("thing", commit, "docs")
    (clone / "docs" / "page.md").write_text("changed since")
    assert list(docs.documents(tmp_path, repository)) == [Document("thing/docs/page.md", text.strip())]
    with pytest.raises(TextError, match=r"(?s)expected a clone with commit .*git init"):
        list(docs.documents(tmp_path / "nowhere", repository))
