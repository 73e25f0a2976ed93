"""A small text, and a training on it that nothing disturbed."""

from pathlib import Path

import pytest

from m2rnn.data.prepare import Settings, prepare
from m2rnn.training.train import train
from tests.training.train_runs import settings_of


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for n in range(24):
        text = "".join(chr(97 + (n * i) % 23) for i in range(10 + 3 * n))
        (folder / "text" / f"{n}.txt").write_text("!" + text if n == 7 else text)
    prepare(Settings({"train": [str(folder / "text")]}, valid_fraction=0.2), folder / "tokens", processes=1)
    return str(folder / "tokens")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: str) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings_of(data), folder)
    return folder
