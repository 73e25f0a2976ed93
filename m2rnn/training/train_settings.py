"""The settings of ``m2rnn train``: a recipe's YAML and ``key=value`` on the command line, checked."""

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from m2rnn.data.streams import why_not_utf8
from m2rnn.runs.errors import SettingsError, check_sizes, did_you_mean
from m2rnn.runs.yaml_values import read_yaml

__all__ = ["FREE", "SettingsError", "TrainSettings", "described", "load_settings"]

RECIPES = "recipes"
MOST_PARTS = 16  # of a key
PRECISIONS = ("auto", "bfloat16", "float32")
# What a run may change when it goes on: these settings decide how the steps are computed, not which they are.
FREE = (
    "data",
    "micro_batch_size",
    "precision",
    "device",
    "compile",
    "checkpoint_activations",
    "fsdp",
    "fsdp_bfloat16",
    "fsdp_reshard",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "report_to",
    "skip_steps",
    "valid_sequences",
)
# Settings that older runs do not name: with the default, such a run goes on.
NEWER = ("bound_every",)


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run of ``m2rnn train``.

    Attributes:
        preset: a name of ``m2rnn presets``.
        data: the folder that ``m2rnn prepare`` made.
        model: overrides of the preset's configuration. The vocabulary is that of the data's tokenizer unless given.
        context: tokens of a sequence.
        batch_size: sequences of a step, of all processes together.
        micro_batch_size: sequences that a process takes at once; gradients are accumulated over the rest.
        steps, warmup_steps: the learning rate rises linearly over ``warmup_steps``, then falls on a cosine to the end;
            in a run that is no longer than ``warmup_steps`` it rises over a tenth of the steps.
        learning_rate: AdamW's peak.
        min_learning_rate: at the end, as a share of the peak.
        beta1, beta2, epsilon, weight_decay: of AdamW.
        max_gradient_norm: longer gradients are scaled down to it.
        bound_every: steps after which W is cut to the model's ``state_weight_bound`` again, if it has one; after the
            last step always.
        seed: of the weights and of the order of the data.
        precision: ``bfloat16`` (autocast; weights and optimizer stay float32), ``float32``, or ``auto``: bfloat16 on a
            GPU, else float32.
        device: ``cpu``, ``cuda`` or ``auto``.
        compile: compile each layer with torch.compile.
        checkpoint_activations: keep only the layers' inputs for the backward pass and compute the rest again.
        fsdp: shard weights, gradients and optimizer over the processes (FSDP2); otherwise each has all (DDP).
        fsdp_bfloat16: gather weights as bfloat16: half the traffic, but the residual stream and the decay parameters
            are then bfloat16 too, and the loss is not that of one GPU to the last digits.
        fsdp_reshard: drop gathered weights between forward and backward pass: less memory, more traffic.
        checkpoint_every: steps from checkpoint to checkpoint.
        keep_checkpoints: how many to keep, the newest ones.
        log_every: steps from entry to entry in what ``report_to`` names; log.jsonl has every step.
        report_to: any of transformers' integrations, such as tensorboard and wandb.
        skip_steps: steps whose gradients are thrown away, such as one with a NaN.
        valid_sequences: how many sequences of the data's split ``valid``, if there is one, to measure the loss on at
            the end; 0 for none.

    Raises:
        SettingsError: for a value that cannot work.
    """

    preset: str
    data: str
    model: dict[str, Any] = field(default_factory=dict)
    context: int = 4096
    batch_size: int = 64
    micro_batch_size: int = 1
    steps: int = 1000
    warmup_steps: int = 100
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-10
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    bound_every: int = 4
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    fsdp: bool = False
    fsdp_bfloat16: bool = False
    fsdp_reshard: bool = True
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 1
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    skip_steps: list[int] = field(default_factory=list)
    valid_sequences: int = 64

    def __post_init__(self) -> None:
        check_sizes(vars(self))
        positive = (
            "context",
            "batch_size",
            "micro_batch_size",
            "steps",
            "checkpoint_every",
            "log_every",
            "bound_every",
        )
        for name in positive:
            self._check(name, getattr(self, name) >= 1, "a whole number of at least 1")
        self._check("keep_checkpoints", self.keep_checkpoints >= 2, "at least 2, in case one is damaged")
        self._check("warmup_steps", self.warmup_steps >= 0, "a whole number of at least 0")
        self._check("seed", 0 <= self.seed < 2**32, "a whole number of at least 0 and less than 2**32")
        self._check("valid_sequences", self.valid_sequences >= 0, "a whole number of at least 0")
        for name in ("learning_rate", "epsilon", "max_gradient_norm"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "a number of at least 0 and less than 1")
        self._check("min_learning_rate", 0 <= self.min_learning_rate <= 1, "a share of learning_rate, from 0 to 1")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        self._check("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._check("device", self.device in ("auto", "cpu", "cuda"), "one of auto, cpu, cuda")
        contradicts = self.fsdp_bfloat16 and self.precision == "float32"
        self._check("fsdp_bfloat16", not contradicts, "false with precision float32")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise SettingsError(f"{name} {getattr(self, name)!r}: expected {expected}")

    @property
    def warmup(self) -> int:
        """``warmup_steps``, or a tenth of a run that is no longer than that."""
        return self.warmup_steps if self.warmup_steps < self.steps else self.steps // 10

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The settings that a run cannot change when it goes on."""
        defaults = {each.name: each.default for each in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in FREE and not (name in NEWER and value == defaults[name])
        }

    def accumulation(self, processes: int) -> int:
        """Micro-batches that each process takes in a step.

        Raises:
            SettingsError: if the step cannot be shared out evenly.
        """
        at_once = self.micro_batch_size * processes
        if self.batch_size % at_once:
            raise SettingsError(
                f"batch_size {self.batch_size}: expected a multiple of {at_once}, which is micro_batch_size "
                f"({self.micro_batch_size}) times the number of processes ({processes})"
            )
        return self.batch_size // at_once


def described() -> list[tuple[str, str]]:
    """The settings as ``name=default``, related ones with commas between, and what `TrainSettings` says of them."""
    defaults = {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(TrainSettings)
    }

    def shown(name: str) -> str:
        default = defaults[name]
        text = str(default).lower() if isinstance(default, bool) else str(default).replace("'", "")
        return name if default is MISSING else f"{name}={text}"

    attributes = (inspect.getdoc(TrainSettings) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=    \w)", attributes)
    pairs = (" ".join(entry.replace("``", "").split()).split(": ", 1) for entry in entries)
    return [(", ".join(map(shown, names.split(", "))), text) for names, text in pairs]


def recipes() -> dict[str, Path]:
    """The recipes that come with the library, by name."""
    packaged = Path(__file__).parents[1] / RECIPES  # of a wheel; a clone has them beside the package
    folder = packaged if packaged.is_dir() else Path(__file__).parents[2] / RECIPES
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_settings(
    recipe: Path | None = None, overrides: Iterable[str] = (), given: Mapping[str, Any] | None = None
) -> TrainSettings:
    """The recipe's settings, with ``given`` and then with ``overrides`` such as ``"steps=100"`` in their place.

    ``recipe`` is a file, or the name of one of `recipes`. A dot reaches into ``model``:
    ``model.mixer_options.m2rnn.num_heads=8``. Values are YAML.

    Raises:
        SettingsError: for a recipe that cannot be read, an unknown key or a value of the wrong type.
    """
    if recipe is not None and not recipe.exists():
        recipe = recipes().get(str(recipe), recipe)
    values: dict[str, Any] = {} if recipe is None else _read_recipe(recipe)
    values |= given or {}
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            equals = ""
        if not equals or not key:
            raise SettingsError(f"{override!r}: expected KEY=VALUE, such as steps=10, or the name of a recipe file")
        _set(values, key, value)
    return _checked(values)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        typed = f"{path}=…, such as steps=10" if str(path).isidentifier() else "KEY=VALUE, such as steps=10"
        known = recipes()
        raise SettingsError(
            f"recipe {path}: {error.strerror}{did_you_mean(path.stem, known)}; by name there are "
            f"{', '.join(known)}. A setting is typed as {typed}"
        ) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"recipe {path}: {why_not_utf8(error)}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"recipe {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"recipe {path}: expected lines like 'steps: 1000', got {type(content).__name__}")
    return content


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    first, *rest = key.split(".")
    if len(rest) > MOST_PARTS:
        raise SettingsError(f"key {key[:40]!r}…: expected at most {MOST_PARTS} parts after model")
    if rest and first != "model":
        raise SettingsError(f"key {key!r}: only model has parts, such as model.hidden_size")
    for name in [first, *rest][:-1]:
        inner = values.get(name)
        values[name] = dict(inner) if isinstance(inner, dict) else {}  # a copy: the recipe's values may be shared
        values = values[name]
    values[[first, *rest][-1]] = value


def _checked(values: Mapping[str, Any]) -> TrainSettings:
    known = {field.name: field for field in fields(TrainSettings)}
    for name in values:
        if name not in known:
            raise SettingsError(f"unknown key {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    for name, described in known.items():
        if name not in values and described.default is MISSING and described.default_factory is MISSING:
            raise SettingsError(f"no {name}: give it with --{name} or in the recipe")
    return TrainSettings(**{name: _typed(name, value, known[name].type) for name, value in values.items()})


def _typed(name: str, value: Any, expected: Any) -> Any:
    """The value if it is of the expected type."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number:
        check_sizes({name: value})  # a float may not hold it
    if expected is float and is_number:
        return float(value)
    if expected is int and is_number and float(value).is_integer():
        return int(value)
    if expected in (str, bool, dict[str, Any]) and isinstance(value, getattr(expected, "__origin__", expected)):
        return value
    if expected == list[str] and isinstance(value, (list, str)) and all(isinstance(item, str) for item in value):
        return [value] if isinstance(value, str) else value
    if expected == list[int] and isinstance(value, list) and all(type(item) is int for item in value):
        return value
    wanted = {
        float: "a number",
        int: "a whole number",
        str: "text",
        bool: "true or false",
        dict[str, Any]: "names with values, such as {hidden_size: 64}",
        list[str]: "a list of names, such as [tensorboard]",
        list[int]: "a list of whole numbers, such as [12, 13]",
    }[expected]
    raise SettingsError(f"{name} {value!r}: expected {wanted}")
