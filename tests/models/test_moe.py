"""Mixtures of experts in a model: the routers' loss reaches training, padding never does."""

from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from m2rnn.layers.moe import load_balancing_loss
from m2rnn.models import M2RNNForCausalLM
from tests.models.small import MLP_OPTIONS, VOCAB, config, make
from tests.tolerances import assert_close

TOP = MLP_OPTIONS["moe"]["num_experts_per_tok"]


def test_auxiliary_loss_is_part_of_the_loss_in_training_alone() -> None:
    model = make("moe", router_aux_loss_coef=0.5)
    ids = torch.randint(VOCAB, (2, 7))
    assert model(ids, labels=ids).aux_loss is None
    evaluated = model(ids, labels=ids, output_router_logits=True)
    assert isinstance(evaluated, MoeCausalLMOutputWithPast)
    assert evaluated.loss == model(ids, labels=ids).loss
    layers = [load_balancing_loss(logits, logits.topk(TOP).indices) for logits in evaluated.router_logits]
    assert len(layers) == 2
    assert_close(evaluated.aux_loss, sum(layers), torch.float64, "output")
    trained = model.train()(ids, labels=ids)
    assert_close(trained.loss, evaluated.loss + 0.5 * sum(layers), torch.float64, "output")
    assert_close(trained.aux_loss, evaluated.aux_loss, torch.float64, "output")
    assert trained.router_logits is None
    model.config.router_aux_loss_coef = 0.0
    assert model(ids, labels=ids).loss == evaluated.loss


def test_configuration_asks_for_router_logits() -> None:
    ids = torch.randint(VOCAB, (2, 7))
    model = make("moe", output_router_logits=True)
    assert [logits.shape for logits in model(ids).router_logits] == [(14, 6)] * 2
    assert model(ids, output_router_logits=False).router_logits is None


def test_routers_learn_from_the_auxiliary_loss() -> None:
    """Its gradient is the difference between the gradients of training and of evaluation."""
    ids = torch.randint(VOCAB, (2, 7))
    weights = {}
    for training in (False, True):
        model = make("moe", router_aux_loss_coef=0.5).train(training)
        outputs = model(ids, labels=ids, output_router_logits=True)
        weights[training] = torch.autograd.grad(outputs.loss, model.model.layers[1].mlp.router.weight)[0]
    model = make("moe").train()
    aux_loss = model(ids, labels=ids).aux_loss
    expected = 0.5 * torch.autograd.grad(aux_loss, model.model.layers[1].mlp.router.weight)[0]
    assert expected.abs().max() > 1e-6
    assert_close(weights[True] - weights[False], expected, torch.float64, "gradient")


@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_padding_does_not_count(side: str) -> None:
    model = make("moe").train()
    short, long = torch.randint(VOCAB, (1, 3)), torch.randint(VOCAB, (1, 8))
    packed = torch.cat([short, long], 1)
    expected = model(packed, cu_seq_lens_q=torch.tensor([0, 3, 11]), labels=packed)
    if side == "packed":  # equal weight for each token: the mean of the sequences' shares and probabilities
        alone = [model(x, output_router_logits=True).router_logits for x in (short, long)]
        layers = [torch.cat(logits) for logits in zip(*alone, strict=True)]
        total = sum(load_balancing_loss(logits, logits.topk(TOP).indices) for logits in layers)
        assert_close(expected.aux_loss, total, torch.float64, "output")
        return
    junk = torch.randint(VOCAB, (1, 5))
    row, holes = [short, junk], [torch.ones_like(short), torch.zeros_like(junk)]
    if side == "left":
        row, holes = row[::-1], holes[::-1]
    ids = torch.cat([torch.cat(row, 1), long])
    mask = torch.cat([torch.cat(holes, 1), torch.ones_like(long)])
    outputs = model(ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert_close(outputs.aux_loss, expected.aux_loss, torch.float64, "output")
    assert_close(outputs.loss, expected.loss, torch.float64, "output")
    for logits in outputs.router_logits:
        assert torch.equal(logits.abs().sum(1) > 0, mask.flatten() == 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_auxiliary_loss(reentrant: bool) -> None:
    ids = torch.randint(VOCAB, (2, 7))
    gradients = []
    for checkpointing in (False, True):
        model = make("moe", router_aux_loss_coef=10.0).train()
        if checkpointing:
            newest = hasattr(model, "activation_checkpointing_enable")
            enable = model.activation_checkpointing_enable if newest else model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, torch.float64, "gradient", name)


def test_gradient_accumulation_weighs_each_part_by_its_labels() -> None:
    """The parts of a batch add up to their mean, weighted by labels, as the cross-entropies do."""
    model = make("moe", router_aux_loss_coef=0.5).train()
    ids = torch.randint(VOCAB, (4, 7))
    labels = ids.clone()
    labels[0, 2:] = -100
    items = int((labels[:, 1:] != -100).sum())
    parts = [
        (model(i, labels=y, num_items_in_batch=items), int((y[:, 1:] != -100).sum()))
        for i, y in zip(ids.split(2), labels.split(2), strict=True)
    ]
    cross_entropy = model.eval()(ids, labels=labels).loss
    auxiliary = sum(0.5 * outputs.aux_loss * n / items for outputs, n in parts)
    assert_close(sum(outputs.loss for outputs, _ in parts), cross_entropy + auxiliary, torch.float64, "output")


def test_implementation_of_experts_is_the_models(tmp_path: Path) -> None:
    model = make("moe", dtype=torch.float32)
    ids = torch.randint(VOCAB, (2, 7))
    expected = model(ids).logits
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("batched_mm")
    layers = [block.mlp.experts.config._experts_implementation for block in model.model.layers]
    assert layers == ["batched_mm"] * 2
    assert_close(model(ids).logits, expected, torch.float32, "output")
    model.save_pretrained(tmp_path)
    loaded = M2RNNForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.model.layers[0].mlp.experts.config._experts_implementation == "eager"
    assert_close(loaded(ids).logits, expected, torch.float32, "output")
    with pytest.raises(ValueError, match="quick"):
        model.set_experts_implementation("quick")


def test_experts_start_as_the_other_layers_do() -> None:
    options = {"num_experts": 32, "num_experts_per_tok": 2, "intermediate_size": 40, "shared_intermediate_size": 64}
    model = M2RNNForCausalLM(config("moe", hidden_size=64, mlp_options={"moe": options}))
    mlp = model.model.layers[1].mlp
    narrow = 0.3 / 2
    for weight, std in (
        (mlp.router.weight, 0.3),
        (mlp.experts.gate_up_proj, 0.3),
        (mlp.experts.down_proj, narrow),
        (mlp.shared_expert.in_proj.weight, 0.3),
        (mlp.shared_expert.out_proj.weight, narrow),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.04)


def test_dense_models_return_what_they_did() -> None:
    ids = torch.randint(VOCAB, (2, 7))
    outputs = make("hybrid").train()(ids, labels=ids, output_router_logits=True)
    assert set(outputs.keys()) == {"loss"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo's own
def test_model_compiles_without_graph_breaks() -> None:
    """With the implementations that have no loop over the experts."""
    model = make("moe", mixers=["attention"], mlps=["moe"], router_aux_loss_coef=0.5).train()
    ids = torch.randint(VOCAB, (2, 5))
    expected = model(ids, labels=ids).loss
    model.set_experts_implementation("batched_mm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids, labels=ids).loss, expected, torch.float64, "output")
