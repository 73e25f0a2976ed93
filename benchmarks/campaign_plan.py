"""The plan of a campaign: which language models are trained, on what, in which order.

A plan is a YAML file:

    shapes:     name: hidden_size, intermediate_size, reference (the model whose parameters the others equal by the
                width of their MLP), mixer_options
    models:     name: pattern and options of its mixers, or `like` another one with other options
    defaults:   settings of every run: those of `m2rnn train` that are equal for all
    texts:      name: what it is
    stages:     in the order of what decides most; each a product of texts, models, learning rates and seeds

A run is a function of the plan alone, but for the learning rate `best`: it waits for the stages that `best_of` names,
and is the rate with which this model (or the one in `tuned_as`) had the lowest validation loss there.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from m2rnn.models import M2RNNConfig, presets
from m2rnn.models.sizes import size_of

PRESET = "hybrid-m2rnn-410m"  # of which a run's overrides leave nothing but what is the same in all
WIDTH_STEP = 8  # of the MLP: matrices of such widths are quick
SHAPE = {"hidden_size", "intermediate_size", "reference", "mixer_options"}
MODEL = {"pattern", "like", "shape", "mixer_options", "fields", "tuned_as"}
STAGE = {"name", "decides", "texts", "models", "learning_rates", "best_of", "seeds", "steps", "settings", "evaluate"}
IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


class PlanError(ValueError):
    """A plan that cannot be run: the message names the entry and what was expected."""


@dataclass(frozen=True)
class Run:
    """One model to train and measure.

    Attributes:
        stage, text, model, seed, steps: of the plan.
        learning_rate: the peak; None while the stage that decides it is not done.
        settings: other settings of ``TrainSettings``.
        overrides: of the preset, what ``TrainSettings.model`` takes.
        evaluate: options of the measurements.
    """

    stage: str
    text: str
    model: str
    seed: int
    steps: int
    learning_rate: float | None
    settings: dict[str, Any]
    overrides: dict[str, Any]
    evaluate: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its result's file; the digest tells runs of a model apart whose definition was changed."""
        rate = "unknown" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"{self.text}.{self.model}.lr{rate}.steps{self.steps}.seed{self.seed}.{self.digest}"

    @property
    def digest(self) -> str:
        decides = [self.text, self.seed, self.steps, self.learning_rate, self.settings, self.overrides]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def tokens(self) -> int:
        return int(self.steps * self.settings["context"] * self.settings["batch_size"])


class Plan:
    """A plan's file, checked.

    Raises:
        PlanError: for what cannot be run.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise PlanError(f"plan {path}: {error}") from error
        self.vocab_size: int = content["vocab_size"]
        self.shapes: dict[str, dict[str, Any]] = content["shapes"]
        self.models: dict[str, dict[str, Any]] = content["models"]
        self.defaults: dict[str, Any] = content["defaults"]
        self.texts: dict[str, str] = content["texts"]
        self.stages: list[dict[str, Any]] = content["stages"]
        self.path = path
        self._overrides: dict[str, dict[str, Any]] = {}
        for kind, entries, known in (("shape", self.shapes, SHAPE), ("model", self.models, MODEL)):
            for name, entry in entries.items():
                _check_keys(f"{kind} {name}", entry, known)
        for stage in self.stages:
            _check_keys(f"stage {stage.get('name')}", stage, STAGE)
            for kind, there in (("texts", self.texts), ("models", self.models)):
                for name in stage[kind]:
                    if name not in there:
                        raise PlanError(f"stage {stage['name']}: {kind} has {name!r}, expected {', '.join(there)}")
        names = [stage["name"] for stage in self.stages]
        if len(set(names)) < len(names):
            raise PlanError(f"stages {', '.join(names)}: expected different names")

    def runs(self, results: Iterable[Mapping[str, Any]]) -> list[Run]:
        """All runs in the plan's order, each once: a stage that asks for one of an earlier stage shares its result."""
        results = list(results)
        found: dict[str, Run] = {}
        for stage in self.stages:
            rates = stage["learning_rates"]
            for seed, text, model, rate in product(stage["seeds"], stage["texts"], stage["models"], rates):
                if rate == "best":
                    rate = self.best_rate(results, stage["best_of"], text, model)
                run = self._run(stage, seed, text, model, rate)
                found.setdefault(run.name if rate is not None else f"{stage['name']} {run.name}", run)
        return list(found.values())

    def best_rate(
        self, results: Iterable[Mapping[str, Any]], sweeps: Sequence[str], text: str, model: str
    ) -> float | None:
        """The rate of the lowest validation loss in a sweep; None until all its rates have a result or a failure."""
        tuned = self.models[model].get("tuned_as", model)
        fitting = [stage for stage in self.stages if stage["name"] in sweeps and tuned in stage["models"]]
        if not fitting:
            raise PlanError(
                f"model {model}: no stage of {', '.join(sweeps)} has it: name one of their models in tuned_as"
            )
        sweep = fitting[0]
        text = text if text in sweep["texts"] else sweep["texts"][0]
        wanted = {
            self._run(sweep, seed, text, tuned, rate).name
            for seed, rate in product(sweep["seeds"], sweep["learning_rates"])
        }
        done = [result for result in results if result["name"] in wanted]
        if len(done) < len(wanted):
            return None
        healthy = [result for result in done if result["failure"] is None]
        if not healthy:
            raise PlanError(f"model {model}: every run of {sweep['name']} failed, so no learning rate is best")
        return float(min(healthy, key=lambda result: result["valid"]["loss"])["settings"]["learning_rate"])

    def _run(self, stage: Mapping[str, Any], seed: int, text: str, model: str, rate: float | None) -> Run:
        settings = {**self.defaults, **stage.get("settings", {})}
        overrides, options = self.overrides(model), stage.get("evaluate", {})
        return Run(stage["name"], text, model, seed, stage["steps"], rate, settings, overrides, options)

    def overrides(self, model: str) -> dict[str, Any]:
        """The model as overrides of a preset, as wide in the MLP as makes it equal in parameters."""
        if model not in self._overrides:
            self._overrides[model] = self._with_width(model, self._width(model))
        return self._overrides[model]

    def _width(self, model: str) -> int:
        shape = self.shapes[self._field(model, "shape")]
        reference = shape["reference"]
        wanted = shape["intermediate_size"]
        if model != reference:
            # The width enters the parameters linearly.
            goal, least, more = (
                self._parameters(name, width)
                for name, width in ((reference, wanted), (model, WIDTH_STEP), (model, 2 * WIDTH_STEP))
            )
            return WIDTH_STEP * max(1, round(1 + (goal - least) / (more - least)))
        return int(wanted)

    def config(self, model: str) -> M2RNNConfig:
        return presets.get(PRESET, **self.overrides(model), vocab_size=self.vocab_size, **IDS)

    def _parameters(self, model: str, width: int) -> int:
        overrides = self._with_width(model, width)
        return _count(json.dumps(overrides, sort_keys=True), self.vocab_size)

    def _with_width(self, model: str, width: int) -> dict[str, Any]:
        shape = self.shapes[self._field(model, "shape")]
        mixers = presets.layers(self._field(model, "pattern"))
        changes = self._options(model)
        options = {
            mixer: {**shape["mixer_options"].get(mixer, {}), **changes.get(mixer, {})}
            for mixer in dict.fromkeys(mixers)
        }
        if set(mixers) == {"attention"}:
            options["attention"] = {"rope_theta": 10000.0, **options["attention"]}
        return {
            "hidden_size": shape["hidden_size"],
            "mixers": mixers,
            "mlps": ["swiglu"] * len(mixers),
            "mixer_options": options,
            "mlp_options": {"swiglu": {"intermediate_size": width}},
            **self.models[model].get("fields", {}),
        }

    def _field(self, model: str, name: str) -> Any:
        """Of the model, or of the one that it is like."""
        entry = self.models[model]
        if name in entry:
            return entry[name]
        if "like" not in entry:
            raise PlanError(f"model {model}: no {name}")
        return self._field(entry["like"], name)

    def _options(self, model: str) -> dict[str, dict[str, Any]]:
        entry = self.models[model]
        merged = self._options(entry["like"]) if "like" in entry else {}
        for mixer, options in entry.get("mixer_options", {}).items():
            merged = {**merged, mixer: {**merged.get(mixer, {}), **options}}
        return merged


@lru_cache
def _count(overrides: str, vocab_size: int) -> int:
    return size_of(presets.get(PRESET, **json.loads(overrides), vocab_size=vocab_size, **IDS)).parameters


def _check_keys(where: str, entry: Mapping[str, Any], known: set[str]) -> None:
    for key in entry:
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")
