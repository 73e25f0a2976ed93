"""Losses by context and by position are those of the definition, whatever the batches, segments and interruptions."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from m2rnn import cli
from m2rnn.data.batches import PackedBatches
from m2rnn.data.sources import DataError, Reading
from m2rnn.data.token_files import FORMAT, TokenDataset
from m2rnn.evaluation import losses as scoring
from m2rnn.evaluation import perplexity, perplexity_report
from m2rnn.evaluation.language_model import load_model, token_losses
from m2rnn.evaluation.perplexity import PerplexitySettings, evaluate_perplexity
from m2rnn.evaluation.perplexity_report import table
from m2rnn.evaluation.recall import copying
from m2rnn.evaluation.spectra import rms_of_states, spectra
from m2rnn.evaluation.text import bytes_of_tokens, choose_split, from_files, from_token_folder
from m2rnn.models.cache import CACHE_NAME
from m2rnn.runs.folder import RunFolderError
from m2rnn.runs.models import short_names
from tests.data.text import prepared
from tests.evaluation.models import TEXTS, byte_documents, naive_loss, save, tokenizer_of, write_texts
from tests.models.small import CONFIGS, make

LONG = "".join(chr(97 + (n * n + n // 3) % 26) for n in range(70))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "hybrid")


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


def evaluate(model, data, out, **settings):
    folders = model if isinstance(model, list) else [model]
    return evaluate_perplexity(folders, str(data), PerplexitySettings(**settings), out)


def only(results):
    (model,) = results["models"].values()
    return model


def losses_in(out):
    """The losses of each measurement, by name."""
    return {path.name.split(".")[-2]: np.fromfile(path, "<f4") for path in (out / "losses").glob("*.f32")}


def sliding_start(begin, token, context, stride):
    return begin + max(0, -(-(token - begin - context) // stride)) * stride


@pytest.mark.parametrize(
    ("settings", "start_of"),
    [
        ({"contexts": (8,), "stride": 3}, lambda begin, token: sliding_start(begin, token, 8, 3)),
        ({"contexts": (5,), "stride": 5}, lambda begin, token: sliding_start(begin, token, 5, 5)),
        ({"contexts": (None,)}, lambda begin, token: begin),
        ({"contexts": (8,), "windows": "packed"}, lambda begin, token: max(begin, (token - 1) // 8 * 8)),
    ],
    ids=["sliding", "apart", "full", "packed"],
)
def test_every_loss_is_that_of_the_definition(tmp_path, model, data, settings, start_of):
    results = only(evaluate(model, data, tmp_path / "out", **settings))
    (found,) = losses_in(tmp_path / "out").values()
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = [token for document in byte_documents() for token in document]
    expected, begin = np.full(len(tokens), -1.0), 0
    for document in byte_documents():
        for token in range(begin + 1, begin + len(document)):
            expected[token] = naive_loss(loaded, tokens[start_of(begin, token) : token + 1])
        begin += len(document)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    (row,) = results["contexts"]
    scored = expected[expected >= 0]
    assert row["tokens_scored"] == len(scored) == len(tokens) - len(byte_documents())
    assert row["loss"] == pytest.approx(scored.mean(), rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(scored.mean()), rel=1e-6)
    of_text = [loss for loss, token in zip(expected, tokens, strict=True) if loss >= 0 and token != 0xFF]
    assert results["text"]["bytes_scored"] == len(of_text)  # a byte a token
    assert row["bits_per_byte"] == pytest.approx(sum(of_text) / len(of_text) / math.log(2), rel=1e-6)


def test_packed_windows_give_the_loss_of_training_on_packed_batches(tmp_path, model):
    tokens = prepared(tmp_path, TEXTS)
    found = only(evaluate(model, tokens.folder, tmp_path / "out", contexts=(8,), windows="packed", split="train"))
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    total = count = 0
    with torch.no_grad():
        for batch in PackedBatches(tokens, 8, 2, seed=None):
            labelled = int((batch["shift_labels"] != -100).sum())
            total += float(loaded(**batch).loss) * labelled if labelled else 0
            count += labelled
    assert count == found["contexts"][0]["tokens_scored"]
    assert found["contexts"][0]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_batch_does_not_change_the_losses(tmp_path, model, data, dtype):
    found = []
    for batch in (1, 3, None):
        out = tmp_path / str(batch)
        evaluate(model, data, out, contexts=(8, None), stride=3, batch=batch, dtype=dtype)
        found.append(losses_in(out))
    for other in found[1:]:
        for name, losses in found[0].items():
            np.testing.assert_allclose(other[name], losses, rtol=1e-7 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("name", [*CONFIGS, "gpt2", "granite"])
@pytest.mark.parametrize("segment", [1, 7, 30])
def test_reading_in_segments_is_reading_at_once(tmp_path, name, segment):
    folder = save(tmp_path, others()[name]() if name in others() else name)
    loaded = load_model(folder, "cpu", "float64")
    ids = torch.randint(255, (3, 31))
    labels = torch.where(torch.rand(3, 31) < 0.7, torch.randint(255, (3, 31)), -100)
    expected = token_losses(loaded, ids, labels)
    logits = loaded.model(input_ids=ids, use_cache=False).logits
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(expected, by_hand[labels.flatten() != -100], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(token_losses(loaded, ids, labels, segment), expected, rtol=1e-11, atol=1e-11)


def others():
    small = {"vocab_size": 300, "bos_token_id": 254, "eos_token_id": 255}
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **small)
    granite = GraniteConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        logits_scaling=4.0,
        initializer_range=0.5,
        **small,
    )
    return {
        "gpt2": lambda: GPT2LMHeadModel(gpt2).double().eval(),
        "granite": lambda: GraniteForCausalLM(granite).double().eval(),
    }


def test_a_model_that_does_not_go_on_from_its_state_is_noticed(tmp_path, data, monkeypatch):
    folder = save(tmp_path / "model")
    evaluate(folder, data, tmp_path / "out", segment=4)  # goes on

    class Forgetful(type(load_model(folder, "cpu").model.base_model)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs | {CACHE_NAME: None})

    def forgetful(*args):
        loaded = load_model(*args)
        loaded.model.base_model.__class__ = Forgetful
        return loaded

    monkeypatch.setattr(perplexity, "load_model", forgetful)
    evaluate(folder, data, tmp_path / "whole", segment=None)
    with pytest.raises(ValueError, match="does not go on from its state with several tokens: use segment 0"):
        evaluate(folder, data, tmp_path / "parts", segment=4)


def test_a_model_that_changes_its_logits_after_the_head_is_noticed(tmp_path):
    assert load_model(save(tmp_path / "gpt2", others()["gpt2"]()), "cpu").head is not None
    assert load_model(save(tmp_path / "granite", others()["granite"]()), "cpu").head is None
    assert load_model(save(tmp_path / "m2rnn", "m2rnn"), "cpu").head is not None


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, model, data, monkeypatch, kept):
    settings = {"contexts": (8, 4), "stride": 3, "batch": 5, "dtype": "float32"}
    whole = evaluate(model, data, tmp_path / "whole", **settings)
    calls = 0

    def count(*args):
        nonlocal calls
        calls += 1
        if calls == kept + 1:
            raise KeyboardInterrupt
        return token_losses(*args)

    monkeypatch.setattr(scoring, "token_losses", count)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, tmp_path / "out", **settings)
    resumed = evaluate(model, data, tmp_path / "out", **settings)
    in_one_go = sum(len(scoring.batches(m.windows, 5)) for m in planned(model, data, settings))
    assert calls == in_one_go + 1  # one of them was interrupted, none repeated
    for name, losses in losses_in(tmp_path / "whole").items():
        np.testing.assert_array_equal(losses_in(tmp_path / "out")[name], losses)
    for mine, theirs in zip(only(resumed)["contexts"], only(whole)["contexts"], strict=True):
        assert {**mine, "seconds": 0, "tokens_per_second": 0} == {**theirs, "seconds": 0, "tokens_per_second": 0}
    assert evaluate(model, data, tmp_path / "out", **settings) == resumed
    assert calls == in_one_go + 1


def test_losses_that_are_not_all_on_disk_are_measured_again(tmp_path, model, data):
    whole = evaluate(model, data, tmp_path / "out", contexts=(8, 4))
    expected = losses_in(tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    short, holed = sorted((tmp_path / "out" / "losses").iterdir())
    short.write_bytes(short.read_bytes()[:-4])
    losses = np.fromfile(holed, "<f4")
    losses[2] = scoring.PENDING  # as if a power cut had kept one page of a window, and not the next
    losses.tofile(holed)
    assert only(evaluate(model, data, tmp_path / "out", contexts=(8, 4)))["text"] == only(whole)["text"]
    for name, found in losses_in(tmp_path / "out").items():
        np.testing.assert_array_equal(found, expected[name])


def planned(model, data, settings):
    settings = PerplexitySettings(**settings)
    return perplexity.measurements(perplexity.load_text(model, 300, str(data), settings), settings)


def test_another_batch_may_finish_a_run_but_another_model_or_text_may_not(tmp_path, model, data, monkeypatch):
    own = shutil.copytree(model, tmp_path / "own")
    monkeypatch.setattr(scoring, "token_losses", None)
    with pytest.raises(TypeError):
        evaluate(own, data, tmp_path / "out", batch=1)
    monkeypatch.undo()
    save(own, make("hybrid", vocab_size=300, hidden_size=32))
    with pytest.raises(RunFolderError, match="models = "):
        evaluate(own, data, tmp_path / "out", batch=1)
    shutil.copytree(model, own, dirs_exist_ok=True)
    evaluate(own, data, tmp_path / "out", batch=3)
    same_size = b"".join(reversed(data.read_bytes().splitlines(keepends=True)))
    for changed in (same_size, b'{"text": "other"}'):
        data.write_bytes(changed)
        with pytest.raises(RunFolderError, match="text = "):
            evaluate(own, data, tmp_path / "out", batch=3)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_files_and_what_prepare_makes_of_them_give_the_same_results(tmp_path, data, tokenizer):
    folder = save(tmp_path / "model", "m2rnn", tokenizer)
    tokens = prepared(tmp_path, TEXTS, tokenizer=str(folder))
    from_files = only(evaluate(folder, data, tmp_path / "of-files"))
    from_tokens = only(evaluate(folder, tokens.folder, tmp_path / "of-tokens"))
    assert from_files["text"] == from_tokens["text"]
    assert from_files["text"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    for one, other in zip(from_files["contexts"], from_tokens["contexts"], strict=True):
        assert one["loss"] == other["loss"]
        assert one["bits_per_byte"] == other["bits_per_byte"]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tmp_path, data):
    uniform = make("m2rnn", vocab_size=300)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    folder = save(tmp_path / "model", uniform, "bpe")
    found = only(evaluate(folder, data, tmp_path / "out"))
    assert found["contexts"][0]["perplexity"] == pytest.approx(300, rel=1e-6)
    tokenizer = tokenizer_of("bpe").backend_tokenizer
    tokenizer.encode_special_tokens = True
    ids = [tokenizer.encode(text).ids for text in TEXTS if text]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    unpredicted = sum(len(tokenizer.id_to_token(document[0])) for document in ids)  # in characters that stand for bytes
    bits = sum(len(document) - 1 for document in ids) * math.log2(300)
    assert found["contexts"][0]["bits_per_byte"] == pytest.approx(bits / (num_bytes - unpredicted), rel=1e-6)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_bytes_of_tokens_add_up_to_those_of_the_text(tokenizer):
    tokenizer = tokenizer_of(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert bytes_of_tokens(tokenizer)[ids].sum() == len(text.encode())
    assert bytes_of_tokens(tokenizer)[tokenizer.all_special_ids].sum() == 0
    expected = bytes_of_tokens(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse()])
    np.testing.assert_array_equal(bytes_of_tokens(tokenizer), expected)


def test_the_loss_by_position_averages_windows_of_one_length(tmp_path, model):
    texts = [LONG, "short", LONG[::-1] + LONG[:20]]
    data = write_texts(tmp_path / "long.jsonl", texts)
    found = only(evaluate(model, data, tmp_path / "out", contexts=(16,), train_length=8, beyond=4))["positions"]
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    windows = [document[start : start + 33] for document in byte_documents(texts) for start in (0, 32)]
    windows = [window for window in windows if len(window) == 33]
    expected = np.array([[naive_loss(loaded, window[: n + 1]) for n in range(1, 33)] for window in windows])
    assert found["windows"] == len(windows) == 4
    assert [row["start"] for row in found["multiples"]] == [0, 8, 16, 24]
    for row in [*found["multiples"], *found["buckets"]]:
        part = expected[:, row["start"] : row["stop"]]
        assert row["loss"] == pytest.approx(part.mean(), rel=1e-6)
        assert row["standard_error"] == pytest.approx(part.mean(1).std(ddof=1) / 2, rel=1e-5)
    assert [row["stop"] for row in found["buckets"]] == list(range(1, 33))
    assert imread(tmp_path / "out" / "loss-by-position.png").size


def test_states_and_spectra_are_measured_beside_the_loss_by_position(tmp_path, model):
    data = write_texts(tmp_path / "long.jsonl", [LONG, "short", LONG[::-1]])
    settings = {"contexts": (16,), "train_length": 8, "beyond": 4}
    foreign = save(tmp_path / "foreign", others()["gpt2"]())
    results = evaluate([model, foreign], data, tmp_path / "out", **settings)
    found, skipped = results["models"].values()
    assert (skipped["spectra"], skipped["state_rms"]) == ([], [])
    loaded = load_model(model, "cpu")
    windows = planned(model, data, settings)[1].windows
    text = perplexity.load_text(model, 300, str(data), PerplexitySettings(**settings))
    expected = scoring.state_rms(loaded, text, windows, (8, 16, 24, 32), segment=None).mean(0).T
    assert [row["layer"] for row in found["state_rms"]] == [0, 2]
    assert [row["mixer"] for row in found["state_rms"]] == ["m2rnn", "gru"]
    np.testing.assert_allclose([row["rms"] for row in found["state_rms"]], expected, rtol=1e-6)
    assert found["spectra"] == spectra(loaded.model)
    name = f"{model.name}.positions-32.f32"
    assert (tmp_path / "out" / "states" / name).stat().st_size == 4 * len(windows) * 4 * 2
    lines = table(results).splitlines()
    cells = next(line for line in lines if line.startswith(f"{model.name} ") and " gru " in line).split()
    assert cells[-4:] == [f"{size:.3g}" for size in found["state_rms"][1]["rms"]]
    assert imread(tmp_path / "out" / "states-by-position.png").size


@pytest.mark.parametrize("segment", [3, 8, 30, None])
def test_measuring_states_changes_no_loss(tmp_path, model, monkeypatch, segment):
    data = write_texts(tmp_path / "long.jsonl", [LONG, "short", LONG[::-1]])
    settings = {"contexts": (16,), "train_length": 8, "beyond": 4, "segment": segment, "dtype": "float64"}
    measured = only(evaluate(model, data, tmp_path / "out", **settings))
    monkeypatch.setattr(perplexity, "recurrent_layers", lambda model: {})
    plain = only(evaluate(model, data, tmp_path / "plain", **settings))
    assert measured["state_rms"]
    assert not plain["state_rms"]
    for name, losses in losses_in(tmp_path / "plain").items():
        np.testing.assert_allclose(losses_in(tmp_path / "out")[name], losses, rtol=1e-6)


@pytest.mark.parametrize("lost", ["losses", "states"])
def test_states_of_an_interrupted_run_are_those_of_one_in_one_go(tmp_path, model, monkeypatch, lost):
    data = write_texts(tmp_path / "long.jsonl", [LONG * 2, LONG[::-1] * 2])
    settings = {"contexts": (16,), "train_length": 8, "beyond": 4, "batch": 2, "recall": True}
    whole = only(evaluate(model, data, tmp_path / "whole", **settings))

    calls = 0

    def stop(cache, layers):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return rms_of_states(cache, layers)

    monkeypatch.setattr(scoring, "rms_of_states", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, data, tmp_path / "out", **settings)
    monkeypatch.undo()
    (file,) = (tmp_path / "out" / lost).glob("*positions*")
    numbers = np.fromfile(file, "<f4")
    assert (numbers == scoring.PENDING).any()
    assert (numbers != scoring.PENDING).any()
    file.unlink()
    resumed = only(evaluate(model, data, tmp_path / "out", **settings))
    for key in ("state_rms", "spectra", "positions", "recall"):
        assert resumed[key] == whole[key]


def test_recall_splits_the_losses_of_every_context(tmp_path, model, data):
    results = evaluate(model, data, tmp_path / "out", contexts=(8, None), recall=True, recall_ngram=2)
    found = only(results)
    tokens, again = byte_documents(), []
    for document in tokens:
        grams = [tuple(document[max(0, n - 2) : n + 1]) for n in range(len(document))]
        again += [n >= 2 and gram in grams[2:n] for n, gram in enumerate(grams)]
    again = np.array(again)
    for row, name in zip(found["contexts"], ("sliding-8-4", f"sliding-full-{max(map(len, tokens))}"), strict=True):
        losses = losses_in(tmp_path / "out")[name]
        for kind, members in (("repeated", again), ("others", ~again & (losses >= 0))):
            of_kind = losses[members].astype(np.float64)
            assert row["recall"][kind]["tokens"] == members.sum() > 0
            assert row["recall"][kind]["loss"] == pytest.approx(of_kind.mean(), rel=1e-12)
            assert row["recall"][kind]["perplexity"] == pytest.approx(math.exp(of_kind.mean()), rel=1e-12)
    assert found["recall"]["ngram"] == 2
    lines = table(results).splitlines()
    (row,) = [line.split() for line in lines if line.split()[:2] == [model.name, "attention"]]
    assert row[-2] == f"{found['recall']['attention_off']['others']['loss']:.4f}"
    assert any(f"{found['recall']['copying']['loss']:.4f}" in line for line in lines)


def test_copying_has_the_length_of_the_first_context_and_the_ids_of_the_text(tmp_path, model, data):
    found = only(evaluate(model, data, tmp_path / "out", contexts=(17, None), recall=True))["recall"]["copying"]
    expected = copying(load_model(model, "cpu"), np.arange(0xFD), 8)  # all bytes but the three that are marks
    assert (found["length"], found["sequences"], found["ids"]) == (8, 64, 0xFD)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["accuracy"] == expected.accuracy
    assert [part["start"] for part in found["buckets"]] == list(range(8))
    assert np.mean([part["loss"] for part in found["buckets"]]) == pytest.approx(found["loss"])
    short = only(evaluate(model, data, tmp_path / "short", contexts=(1024,), recall=True))["recall"]["copying"]
    assert short["length"] == (max(map(len, byte_documents())) - 1) // 2


def test_attention_off_is_the_loss_of_a_model_whose_attention_projects_to_zero(tmp_path, data):
    made = make("hybrid", vocab_size=300)
    folder = save(tmp_path / "hybrid", made)
    torch.nn.init.zeros_(made.model.layers[1].mixer.out_proj.weight)
    off = save(tmp_path / "off", made)
    settings = {"contexts": (8, 16), "stride": 3, "recall": True}
    found = only(evaluate(folder, data, tmp_path / "out", **settings))
    expected = only(evaluate(off, data, tmp_path / "out-off", **settings))["contexts"][0]
    for key in ("loss", "perplexity", "bits_per_byte"):
        assert found["recall"]["attention_off"][key] == pytest.approx(expected[key], rel=1e-6)
    for kind in ("repeated", "others"):
        of_kind = found["recall"]["attention_off"][kind]
        assert of_kind == pytest.approx(expected["recall"][kind], rel=1e-6)
    assert found["contexts"][0]["loss"] != pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["m2rnn", "rope", "gpt2"])
def test_attention_off_is_for_hybrids(tmp_path, data, name):
    folder = save(tmp_path / name, others()[name]() if name in others() else name)
    results = evaluate(folder, data, tmp_path / "out", contexts=(8,), recall=True)
    assert only(results)["recall"]["attention_off"] is None
    assert table(results).splitlines()[-1].split()[-2:] == ["-", "-"]


def test_a_stride_is_for_windows_and_not_for_whole_documents(tmp_path, model, data):
    found = only(evaluate(model, data, tmp_path / "out", contexts=(1024, None), stride=512))["contexts"]
    assert [row["context"] for row in found] == [1024, None]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)  # no document is longer


def test_a_model_that_is_not_there_is_named_before_another_is_evaluated(tmp_path, model, data):
    with pytest.raises(ValueError, match="nothing is no folder"):
        evaluate([model, tmp_path / "nothing"], data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_may_leave_numbers_out(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "one": 2, "two": 299}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    data = write_texts(tmp_path / "texts.jsonl", ["one two one", "two two"])
    for size in (300, 299):
        folder = save(tmp_path / f"{size}", "m2rnn", None, vocab_size=size)
        tokenizer.save_pretrained(folder)
        if size == 300:
            assert only(evaluate(folder, data, tmp_path / "out"))["contexts"][0]["tokens_scored"] == 5
        else:
            with pytest.raises(ValueError, match=r"a vocabulary of 299 ids, the tokenizer of .* one of 300"):
                evaluate(folder, data, tmp_path / "refused")


def test_joined_documents_are_read_as_one(tmp_path, model, data):
    found = only(evaluate(model, data, tmp_path / "out", contexts=(None,), joined=True, documents=3))
    tokens = [token for document in byte_documents()[:3] for token in document]
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    expected = np.mean([naive_loss(loaded, tokens[: n + 1]) for n in range(1, len(tokens))])
    assert found["contexts"][0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["text"]["bytes_scored"] == sum(len(text.encode()) for text in TEXTS[:4]) - 1


def test_several_models_share_a_table_and_plots(tmp_path, data):
    folders = [save(tmp_path / name / "model", name) for name in ("m2rnn", "rope")]
    results = evaluate(folders, data, tmp_path / "out", contexts=(4, 16), train_length=5, beyond=4)
    assert list(results["models"]) == ["m2rnn/model", "rope/model"]
    lines = table(results).splitlines()
    for name, model in results["models"].items():
        for row in model["contexts"]:
            cells = next(line.split() for line in lines if line.split()[:3] == [name, "sliding", str(row["context"])])
            assert cells[5] == f"{row['loss']:.4f}"
            assert cells[7] == f"{row['bits_per_byte']:.4f}"
        assert any(f"{model['positions']['multiples'][2]['loss']:.4f}" in line for line in lines)
    for plot in ("perplexity-by-context.png", "loss-by-position.png"):
        assert imread(tmp_path / "out" / plot).size


def test_names_of_lines_are_apart_and_in_order():
    assert perplexity_report._apart([0.5, 0.1, 0.51], 0.1) == pytest.approx([0.5, 0.1, 0.6])
    assert perplexity_report._apart([1.0, 1.0, 0.99], 0.1) == pytest.approx([0.9, 1.0, 0.8])
    assert sorted(perplexity_report._apart([0.5] * 40, 0.1)) == pytest.approx([n / 39 for n in range(40)])


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1, [0]),
        (8, [*range(8)]),
        (9, [0, 1, 3, 7, 8]),
        (16, [0, 1, 3, 7, 15]),
        (1024, [0, 31, 63, 127, 255, 511, 1023]),
    ],
)
def test_a_table_of_many_multiples_has_the_first_the_last_and_powers_of_two(count, shown):
    assert perplexity_report._some(count) == shown


def test_files_of_models_lie_in_folders_of_their_names_and_earlier_ones_are_used_on(tmp_path, data):
    folders = [save(tmp_path / name / "model", "m2rnn") for name in ("a", "b")]
    settings = PerplexitySettings(contexts=(8,))
    found = evaluate_perplexity(folders, str(data), settings, tmp_path / "out")
    losses = tmp_path / "out" / "losses"
    assert [str(path.relative_to(losses)) for path in sorted(losses.rglob("*.f32"))] == [
        "a/model.sliding-8-4.f32",
        "b/model.sliding-8-4.f32",
    ]
    for name in ("a", "b"):  # as an earlier version left them when it was interrupted
        (losses / name / "model.sliding-8-4.f32").rename(losses / f"{name}%2Fmodel.sliding-8-4.f32")
    (tmp_path / "out" / "results.json").unlink()
    again = evaluate_perplexity(folders, str(data), settings, tmp_path / "out")
    assert [model["contexts"][0]["loss"] for model in again["models"].values()] == [
        model["contexts"][0]["loss"] for model in found["models"].values()
    ]
    assert [model["contexts"][0]["tokens_per_second"] for model in again["models"].values()] == [None, None]


def test_a_name_is_the_end_of_the_path_that_tells_models_apart(tmp_path):
    assert short_names([tmp_path / "a" / "model", tmp_path / "b" / "model"]) == ["a/model", "b/model"]
    assert short_names([tmp_path / "a" / "model"]) == ["model"]
    with pytest.raises(ValueError, match="the same model twice"):
        short_names([tmp_path, tmp_path])


def test_a_tokenizer_that_begins_texts_with_bos_does_so_and_all_bytes_count(tmp_path, data):
    from tokenizers.processors import TemplateProcessing

    folder = save(tmp_path / "model", "m2rnn", None)
    tokenizer = tokenizer_of("bytes")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 254)])
    tokenizer.save_pretrained(folder)
    found = only(evaluate(folder, data, tmp_path / "out", contexts=(None,)))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    documents = [[0xFE, *document] for document in byte_documents()]
    expected = [naive_loss(loaded, document[: n + 1]) for document in documents for n in range(1, len(document))]
    assert found["contexts"][0]["loss"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert found["text"]["bytes_scored"] == sum(len(text.encode()) for text in TEXTS)


def test_a_byte_order_mark_of_a_file_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\ufeff".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "two"}\n'.encode())
    text = from_files(str(tmp_path), Reading(), tokenizer_of("bytes"))
    assert bytes(text.tokens) == "one\ufeff".encode() + b"\xfftwo\xff"
    (tmp_path / "a.txt").write_bytes("one".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.txt, document 1: UTF-16, expected UTF-8: convert the file"):
        from_files(str(tmp_path), Reading(), tokenizer_of("bytes"))


def test_text_that_cannot_be_read_and_damaged_tokens_are_named(tmp_path, data):
    data.write_bytes(b'{"text": "good"}\n{"text": "half\n')
    with pytest.raises(DataError, match=r"line 2: not JSON.*\. Mend or remove it, .*--on-error skip"):
        from_files(str(data), Reading(), tokenizer_of("bytes"))
    folder = prepared(tmp_path / "tokens", TEXTS).folder
    content = bytearray((folder / "train.tokens.bin").read_bytes())
    content[5] ^= 1
    (folder / "train.tokens.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.tokens\.bin is not what m2rnn prepare wrote"):
        from_token_folder(folder, "train")


def test_a_token_that_is_written_as_a_byte_is_one_byte():
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "▁é": 2, "<0x>": 3}
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    sizes = bytes_of_tokens(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert sizes[1:].tolist() == [1, 3, 4]


def test_validation_comes_before_test_and_training_text(tmp_path):
    for splits, chosen in ((["train", "test", "valid"], "valid"), (["train", "test"], "test"), (["train"], "train")):
        manifest = {"format": FORMAT, "splits": {split: {} for split in splits}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert choose_split(tmp_path, None) == chosen
        assert choose_split(tmp_path, "train") == "train"


def test_the_command_measures_recall(tmp_path, model, data):
    done = run(
        model, "--data", data, "--out", tmp_path / "out", "--context", "8", "--recall", "--recall-ngram", "2",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert only(json.loads(done.stdout))["recall"]["ngram"] == 2


def run(*arguments):
    return CliRunner().invoke(cli.app, ["eval", "text", *map(str, arguments)])


def test_the_command_prints_the_table_or_the_results(tmp_path, model, data):
    options = [model, "--data", data, "--out", tmp_path / "out", "--context", "8,full", "--device", "cpu"]
    printed = run(*options)
    assert printed.exit_code == 0, printed.output
    assert [line.split()[2] for line in printed.stdout.splitlines()[1:3]] == ["8", "full"]
    assert f"results, plots and the loss of each token: {tmp_path / 'out'}" in printed.stdout
    as_json = json.loads(run(*options, "--json").stdout)
    assert as_json == json.loads((tmp_path / "out" / "results.json").read_text())
    single = run(model, "--data", data, "--out", tmp_path / "single", "--context", "8", "--device", "cpu")
    assert f"results and the loss of each token: {tmp_path / 'single'}" in single.stdout
    assert not list((tmp_path / "single").glob("*.png"))


MISTAKES = {
    "no model": (["{tmp}/nothing", "--data", "{data}"], "nothing is no folder"),
    "no config": (["{tmp}", "--data", "{data}"], "has no config.json"),
    "no text": (["{model}"], "Missing option '--data'"),
    "no data": (["{model}", "--data", "{tmp}/nothing"], "no such file or folder"),
    "empty text": (["{model}", "--data", "{empty}"], "empty"),
    "only empty documents": (["{model}", "--data", "{blank}"], "every document is empty"),
    "unfinished tokens": (["{model}", "--data", "{unfinished}"], "holds no finished token files"),
    "short context": (["{model}", "--data", "{data}", "--context", "1"], "context 1: expected"),
    "odd context": (["{model}", "--data", "{data}", "--context", "8,many"], "context '8,many'"),
    "context twice": (["{model}", "--data", "{data}", "--context", "8,8"], "context 8,8"),
    "stride": (["{model}", "--data", "{data}", "--context", "8", "--stride", "9"], "stride 9"),
    "packed stride": (["{model}", "--data", "{data}", "--windows", "packed", "--stride", "9"], "neither a stride"),
    "windows": (["{model}", "--data", "{data}", "--windows", "some"], "windows 'some'"),
    "batch beyond numbers": (["{model}", "--data", "{data}", "--batch", "9" * 30], "batch 999999999999"),
    "context beyond numbers": (["{model}", "--data", "{data}", "--context", "9" * 19], "contexts 999999999"),
    "batch": (["{model}", "--data", "{data}", "--batch", "0"], "batch 0"),
    "dtype": (["{model}", "--data", "{data}", "--dtype", "int8"], "dtype 'int8'"),
    "device": (["{model}", "--data", "{data}", "--device", "abacus"], "device 'abacus'"),
    "too long": (["{model}", "--data", "{data}", "--train-length", "1000"], "no document has the 8,001 tokens"),
    "twice": (["{model}", "{model}", "--data", "{data}"], "the same model twice"),
    "split of a file": (["{model}", "--data", "{data}", "--split", "train"], "split 'train'"),
    "ngram": (
        ["{model}", "--data", "{data}", "--recall", "--recall-ngram", "0"],
        "recall_ngram 0: expected at least 1",
    ),
    "ngram alone": (["{model}", "--data", "{data}", "--recall-ngram", "2"], "recall_ngram 2: expected with --recall"),
    "recall of tasks": (["{model}", "--tasks", "a", "--recall"], "No such option: --tasks"),
    "option of tasks": (["{model}", "--data", "{data}", "--limit", "3"], "No such option: --limit"),
    "no tokenizer": (["{bare}", "--data", "{data}"], "has no tokenizer"),
    "vocabulary": (["{small}", "--data", "{data}"], "a vocabulary of 23 ids"),
    "other tokenizer": (["{bpe}", "--data", "{tokens}"], "is not the tokenizer that made"),
    "no weights": (["{headless}", "--data", "{data}"], "missing or of another shape"),
    "damaged weights": (["{damaged}", "--data", "{data}"], "cannot be loaded"),
    "positions": (["{gpt2}", "--data", "{data}", "--context", "33"], "learned positions for 32"),
    "not finite": (["{nan}", "--data", "{data}"], "a loss is not finite"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, model):
    """Folders and files with something wrong, by what it is."""
    from safetensors.torch import load_file, save_file

    tmp = tmp_path_factory.mktemp("mistakes")
    places = {"tmp": tmp, "model": model, "data": write_texts(tmp / "data.jsonl")}
    places["blank"] = write_texts(tmp / "blank.jsonl", ["", ""])
    places["empty"] = tmp / "empty.txt"
    places["empty"].write_text("")
    places["tokens"] = prepared(tmp / "prepared", TEXTS).folder
    places["unfinished"] = shutil.copytree(places["tokens"], tmp / "unfinished")
    (places["unfinished"] / "manifest.json").unlink()
    (places["unfinished"] / "train.tokens.bin").rename(places["unfinished"] / "train.tokens.bin.partial")
    places["bare"] = save(tmp / "bare", "m2rnn", None)
    places["small"] = save(tmp / "small", make("m2rnn"))
    places["bpe"] = save(tmp / "bpe", "m2rnn", "bpe")
    places["gpt2"] = save(tmp / "gpt2", GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=32)))
    for name in ("headless", "damaged", "nan"):
        places[name] = shutil.copytree(model, tmp / name)
    weights = load_file(model / "model.safetensors")
    (places["damaged"] / "model.safetensors").write_bytes(b"12345678 not tensors")
    nan = {key: x * math.nan if key == "lm_head.weight" else x for key, x in weights.items()}
    save_file(nan, places["nan"] / "model.safetensors", {"format": "pt"})
    del weights["lm_head.weight"]
    save_file(weights, places["headless"] / "model.safetensors", {"format": "pt"})
    return places


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, places, mistake):
    arguments, message = MISTAKES[mistake]
    done = run(*(argument.format(**places) for argument in arguments), "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in done.stderr.splitlines()[-1]
    assert isinstance(done.exception, SystemExit)
    if (tmp_path / "out").exists() and mistake != "not finite":  # known once the model has run
        assert {file.name for file in (tmp_path / "out").iterdir()} == {"lock", "settings.json"}


def test_a_model_without_tokenizer_reads_what_prepare_made(tmp_path, places):
    found = only(evaluate(places["bare"], places["tokens"], tmp_path / "out"))
    assert found["text"]["tokens"] == TokenDataset(places["tokens"]).num_tokens
