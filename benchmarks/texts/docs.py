"""Technical documentation in English: the Markdown of four public repositories of Microsoft, at pinned commits.

    python benchmarks/texts/docs.py CLONES --out FOLDER

CLONES holds a clone of each repository, under its name; without them the command says how to get them. They are under
Creative Commons Attribution 4.0, © Microsoft Corporation and contributors. A document is a file without its front
matter, with one empty line where there are several. Files of fewer than 1,500 characters are mostly links and left out.
Writes train.jsonl and valid.jsonl, and checks that they are the ones that texts.lock names.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from split import Document, HeldOut, TextError, progress, write_texts


@dataclass(frozen=True)
class Repository:
    """Where the Markdown of one repository is."""

    name: str
    commit: str
    folder: str


REPOSITORIES = (
    Repository("win32", "47e64c189dcb1c1a42c221380ccf0ec81cc82d4b", "desktop-src"),
    Repository("windows-driver-docs", "825aa15f476fc33a3e80abd3db387b025771f6f8", "windows-driver-docs-pr"),
    Repository("cpp-docs", "a2e592a8fc391b6aff8d1323f5b58696abdc5d57", "docs"),
    Repository("PowerShell-Docs", "27138b21b41de3e2b43cfcac4a56861ca419d5eb", "reference"),
)
FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n---[ \t]*(\n|\Z)", re.DOTALL)
FEWEST_CHARACTERS = 1500
HELD_OUT = HeldOut(long=60, long_bytes=80_000, ordinary=300, fewest_long=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", type=Path, help="a folder that holds the four clones")
    parser.add_argument("--out", type=Path, required=True, help="a folder for train.jsonl and valid.jsonl")
    parser.add_argument("--update-lock", action="store_true", help="write the texts' hashes instead of checking them")
    arguments = parser.parse_args()
    try:
        found = [document for repository in REPOSITORIES for document in documents(arguments.clones, repository)]
        write_texts("docs", found, HELD_OUT, arguments.out, update_lock=arguments.update_lock)
    except TextError as error:
        sys.exit(str(error))


def documents(clones: Path, repository: Repository) -> Iterator[Document]:
    """The documents of one clone. They are read from its objects: what is checked out changes nothing."""
    listed = git(clones, repository, ["ls-tree", "-r", "-z", repository.commit, "--", repository.folder])
    paths, objects = [], []
    for entry in listed.decode().split("\0")[:-1]:
        about, path = entry.split("\t", 1)
        if path.lower().endswith(".md"):
            paths.append(path)
            objects.append(about.split()[2])
    progress(f"{repository.name}: reading {len(paths):,} files")
    content = git(clones, repository, ["cat-file", "--batch"], "".join(name + "\n" for name in objects).encode())
    position = 0
    for path in paths:
        heading, position = content[position : content.index(b"\n", position)], content.index(b"\n", position) + 1
        if heading.endswith(b" missing"):
            raise TextError(f"{repository.name}: {path} is not in the clone: fetch the whole commit")
        size = int(heading.split()[2])
        text = markdown(content[position : position + size])
        position += size + 1
        if len(text) >= FEWEST_CHARACTERS:
            yield Document(f"{repository.name}/{path}", text)


def markdown(content: bytes) -> str:
    """The text of a Markdown file: bytes that are no UTF-8 become U+FFFD, as in an editor."""
    text = content.decode("utf-8-sig", "replace").replace("\r\n", "\n")
    return re.sub(r"\n{3,}", "\n\n", FRONT_MATTER.sub("", text, count=1)).strip()


def git(clones: Path, repository: Repository, arguments: list[str], given: bytes = b"") -> bytes:
    """What a command of git prints in a clone."""
    clone = clones / repository.name
    ran = subprocess.run(["git", "-C", str(clone), *arguments], input=given, capture_output=True)
    if ran.returncode:
        raise TextError(
            f"{clone}: expected a clone with commit {repository.commit}, but git says: {ran.stderr.decode().strip()}\n"
            "Get those that are missing with\n" + "\n".join(how_to_clone(clones / of.name, of) for of in REPOSITORIES)
        )
    return ran.stdout


def how_to_clone(clone: Path, repository: Repository) -> str:
    """The commands that fetch one commit and no history."""
    url = f"https://github.com/MicrosoftDocs/{repository.name}"
    return f"  git init {clone}; git -C {clone} fetch --depth 1 {url} {repository.commit}"


if __name__ == "__main__":
    main()
