"""Folders of models: whether there is one, and short names that tell them apart. Knows nothing of what is in them."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from m2rnn.runs.folder import MODEL

CONFIG = "config.json"


def check_model_folders(folders: Sequence[Path]) -> None:
    """Raise ``ValueError`` for the first that holds no model, before hours go into the others."""
    for folder in folders:
        if not (folder / CONFIG).is_file():
            what = "has no config.json" if folder.is_dir() else "is no folder"
            of_run = folder / MODEL
            meant = f"; did you mean {of_run}?" if (of_run / CONFIG).is_file() else ""
            raise ValueError(
                f"{folder} {what}: expected a folder with a Hugging Face model (config.json and safetensors){meant}"
            )


def short_names(folders: Sequence[Path]) -> list[str]:
    """For each folder the end of its path that tells it from the others."""
    whole = [folder.resolve().parts for folder in folders]
    for parts in range(1, max(map(len, whole)) + 1):
        names = ["/".join(path[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same model twice: {', '.join(map(str, folders))}")


def results_file(folder: Path, name: str, ending: str) -> Path:
    """The file for results of the model of that short name; ``a/model`` is ``model`` in the folder ``a``.

    A run of an earlier version, which wrote ``a%2Fmodel``, goes on with its files.
    """
    earlier = folder / f"{quote(name, safe='')}{ending}"
    if earlier.exists():
        return earlier
    path = folder / f"{name}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
