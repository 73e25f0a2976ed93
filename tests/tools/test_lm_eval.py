"""lm-eval by a model's path, in a process that has not imported this library."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.models.fresh import run, save_tokenizer
from tests.models.small import make

MEASURE = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", batch_size=2)
pairs = [("w3 w4", " w5 w6"), ("w3", " w7")]
requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
print(json.dumps(model.loglikelihood(requests, disable_tqdm=True)))
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval brings 50 packages")
def test_lm_eval_measures_a_model_by_its_path(tmp_path: Path) -> None:
    model = make("hybrid", torch.float32)
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    found = json.loads(run(MEASURE, tmp_path / "model", home=tmp_path).splitlines()[-1])
    for (likelihood, _), ids, scored in zip(found, ([3, 4, 5, 6], [3, 7]), (2, 1), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(ids[1:])[:, None])[-scored:].sum()
        assert likelihood == pytest.approx(float(expected), abs=1e-4)
