"""The small Python file beside a saved model, through which transformers finds this package.

With ``trust_remote_code=True`` transformers runs the file that ``auto_map`` in config.json names. Ours holds no code of
a model: it imports the classes of the installed package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHIM = "modeling_m2rnn"
#: What each Auto class finds in the shim of this library's own models
AUTO_MAP = {
    "AutoConfig": f"{SHIM}.M2RNNConfig",
    "AutoModel": f"{SHIM}.M2RNNModel",
    "AutoModelForCausalLM": f"{SHIM}.M2RNNForCausalLM",
    "AutoModelForSequenceClassification": f"{SHIM}.M2RNNForSequenceClassification",
    "AutoModelForTokenClassification": f"{SHIM}.M2RNNForTokenClassification",
}
SWAPPED_SHIM = "modeling_m2rnn_swapped"  #: of transformers' models with M2RNN layers in them

_TEXT = '''"""Written by m2rnn: the code of this model is in that package, which this file imports.

transformers runs this file under trust_remote_code=True.
"""

try:
    {imports}
except ModuleNotFoundError as error:
    if error.name != "m2rnn":
        raise
    raise ImportError("this model needs the package m2rnn, which is not installed: pip install m2rnn") from error
'''


def write_shim(folder: str | Path, auto_map: Mapping[str, Any] | None) -> None:
    """Write the shim that ``auto_map`` names into ``folder``; nothing where it names none of ours."""
    for module in (SHIM, SWAPPED_SHIM):
        names = _names(auto_map or {}, module)
        if module == SHIM and names:
            classes = ",\n        ".join(_names(AUTO_MAP, SHIM))
            text = _TEXT.format(imports=f"from m2rnn.models import (\n        {classes},\n    )")
        elif names:
            classes = "".join(f'{name} = swapped_class("{name}")\n' for name in names)
            text = _TEXT.format(imports="from m2rnn.convert import swapped_class") + "\n" + classes
        else:
            continue
        Path(folder, f"{module}.py").write_text(text, encoding="utf-8")


def with_own_entries(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """``auto_map`` as this version's shim has it: entries of other files stay, those of our own file are today's."""
    names_ours = [name for name, found in (auto_map or {}).items() if str(found).startswith(f"{SHIM}.")]
    return AUTO_MAP | {name: found for name, found in (auto_map or {}).items() if name not in names_ours}


def _names(auto_map: Mapping[str, Any], module: str) -> list[str]:
    """The classes that ``auto_map`` looks for in a module, each once."""
    places = [str(place).rsplit(".", 1) for place in auto_map.values()]
    return sorted({place[-1] for place in places if place[0] == module})
