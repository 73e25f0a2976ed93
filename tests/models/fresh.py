"""Fresh Python processes that use a saved model, and what they need."""

import subprocess
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.models.small import VOCAB

WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, *others):
        if name.split(".")[0] == "m2rnn":
            raise ModuleNotFoundError(f"No module named {name!r}", name="m2rnn")
sys.meta_path.insert(0, Absent())
"""


def run(code: str, *arguments: Path, home: Path) -> str:
    """What a fresh Python process prints, which keeps the copies of shims in ``home``."""
    environment = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0").save_pretrained(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
