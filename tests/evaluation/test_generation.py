"""Completions are those of greedy decoding by hand, streamed as text alone, and the same in any batch."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from m2rnn import cli
from m2rnn.evaluation.generation import (
    GenerationSettings,
    _continuation,
    _Stream,
    complete,
    complete_all,
    memory,
    read_prompts,
)
from m2rnn.evaluation.language_model import load_model, load_model_tokenizer
from tests.evaluation.models import TEXTS, save, tokenizer_of
from tests.models.small import CONFIGS

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "hybrid")


def loaded(folder):
    tokenizer = load_model_tokenizer(folder)
    assert tokenizer is not None
    return load_model(folder, "cpu"), tokenizer


@torch.no_grad()
def greedy(model, ids, tokens):
    """By the definition: all of the text again for each token."""
    for _ in range(tokens):
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-tokens:]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("static", [False, True])
def test_a_completion_is_what_greedy_decoding_by_hand_gives(tmp_path, name, static):
    model, tokenizer = loaded(save(tmp_path, name))
    settings = GenerationSettings(max_new_tokens=12, temperature=0, ignore_eos=True, static=static)
    pieces: list[str] = []
    done, speed = complete(model, tokenizer, "one two", settings, pieces.append)
    expected = greedy(model.model, list(b"one two"), 12)
    assert done.completion == tokenizer.decode(expected, skip_special_tokens=True) == "".join(pieces)
    assert (done.prompt_tokens, done.new_tokens, speed.tokens) == (7, 12, 12)


def test_a_batch_gives_each_prompt_its_own_completion(tmp_path, folder):
    model, tokenizer = loaded(folder)
    prompts = ["one", "", "two three four, five", "ünï", "x"]
    for batch in (1, 3, 5):
        complete_all(model, tokenizer, prompts, GREEDY, batch, tmp_path / f"{batch}.jsonl")
        lines = [json.loads(line) for line in (tmp_path / f"{batch}.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == prompts
        for line in lines:
            expected = greedy(model.model, list(line["prompt"].encode()) or [0xFE], 12)
            assert line["completion"] == tokenizer.decode(expected, skip_special_tokens=True)
            assert line["new_tokens"] == 12
    assert not list(tmp_path.glob("*.partial"))


def test_padding_is_not_penalised_as_a_repetition(tmp_path, folder):
    model, tokenizer = loaded(folder)
    settings = GenerationSettings(max_new_tokens=6, temperature=0, ignore_eos=True, repetition_penalty=50.0)
    tokenizer.pad_token = None
    first = greedy(model.model, list(b"x"), 1)[0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)  # which also pads
    for batch in (1, 2):
        complete_all(model, tokenizer, ["x", "one two three"], settings, batch, tmp_path / f"{batch}.jsonl")
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


def test_a_completion_ends_with_eos(tmp_path):
    model, tokenizer = loaded(save(tmp_path, vocab_size=256))
    third = greedy(model.model, list(b"one"), 3)[2]
    assert third not in greedy(model.model, list(b"one"), 2)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(third)
    settings = GenerationSettings(max_new_tokens=12, temperature=0)
    assert complete(model, tokenizer, "one", settings)[0].new_tokens == 3
    complete_all(model, tokenizer, ["one", "two three"], settings, 2, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["new_tokens"] for line in lines] == [
        3,
        complete(model, tokenizer, "two three", settings)[0].new_tokens,
    ]


def test_the_seed_decides_what_is_sampled(folder):
    def sample(**settings):
        return complete(model, tokenizer, "one", GenerationSettings(max_new_tokens=20, **settings))[0].completion

    model, tokenizer = loaded(folder)
    assert sample(seed=1) == sample(seed=1)
    assert len({sample(seed=seed) for seed in range(4)}) == 4
    assert sample(top_k=1) == sample(temperature=0) == sample(top_p=1e-6) == sample(min_p=1.0)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_streamed_text_is_the_decoded_text_even_if_it_is_no_utf8(name):
    tokenizer = tokenizer_of(name)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    for ids in [*texts, [0xE6, 0xBC], [0xC3, 65, 0x80, 0x80], torch.randint(256, (200,)).tolist()]:
        pieces: list[str] = []
        stream = _Stream(tokenizer, [], pieces.append)
        for value in (torch.tensor([[1, 2]]), *(torch.tensor([token]) for token in ids)):
            stream.put(value)
        stream.end()
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]
WORDS = ["a", "b", "▁", "▁a", "▁the", "ed", ".", ",", "'", "▁'", "n", "漢", "é", "▁\N{REPLACEMENT CHARACTER}"]


def llama_decoder() -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def kinds() -> dict[str, PreTrainedTokenizerFast]:
    """A small tokenizer of every kind that language models have."""
    numbered = {word: number for number, word in enumerate([*SPECIAL, *BYTES, *WORDS])}
    fallback = Tokenizer(BPE(numbered, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fallback.decoder = llama_decoder()
    gemma = Tokenizer(BPE(numbered, [], unk_token="<unk>", byte_fallback=True))
    gemma.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    letters = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    byte_level = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    byte_level.decoder = decoders.ByteLevel()
    pieces = [*SPECIAL, "do", "##n", "n", "it", "'", "s", "##s", "t", "m", "ve", "re", ".", "?", "!", ",", "漢", "##é"]
    wordpiece = Tokenizer(WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    wordpiece.decoder = decoders.WordPiece("##", cleanup=False)
    tidy = Tokenizer(WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"))
    tidy.decoder = decoders.WordPiece("##", cleanup=True)
    scored = [(piece, -float(number)) for number, piece in enumerate([*SPECIAL, *BYTES, *WORDS])]
    unigram = Tokenizer(Unigram(scored, unk_id=0, byte_fallback=True))
    unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    plain = Tokenizer(Unigram([piece for piece in scored if piece[0] not in BYTES], unk_id=0))
    plain.decoder = decoders.Metaspace()
    backends = {
        "BPE of bytes": byte_level,
        "BPE with byte fallback": fallback,
        "BPE with byte fallback, no strip": gemma,
        "WordPiece": wordpiece,
        "WordPiece, tidy": tidy,
        "Unigram": plain,
        "Unigram with byte fallback": unigram,
    }
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    found = {name: PreTrainedTokenizerFast(tokenizer_object=backend, **tokens) for name, backend in backends.items()}
    cleaned = PreTrainedTokenizerFast(tokenizer_object=wordpiece, clean_up_tokenization_spaces=True, **tokens)
    return found | {"WordPiece, cleaned": cleaned}


KINDS = kinds()


def streamed(tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    """What is written after each token, and at the end."""
    pieces: list[str] = []
    after = []
    stream = _Stream(tokenizer, prompt, pieces.append)
    for value in (prompt, *([token] for token in ids)):
        stream.put(torch.tensor(value))
        after.append("".join(pieces))
    stream.end()
    assert stream.text == "".join(pieces)
    return [*after[1:], "".join(pieces)]


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_what_streams_is_what_the_whole_decodes_to(name: str, data: st.DataObject) -> None:
    """Of any tokens: bytes that are no UTF-8, special tokens among them, and ids that the tokenizer does not have."""
    tokenizer = KINDS[name]
    size = len(tokenizer)
    likely = st.sampled_from([*range(3), *range(max(3, size - len(WORDS)), size + 2)])
    token = st.one_of(st.integers(0, size + 1), likely)
    ids = data.draw(st.lists(token, max_size=40))
    ids = ids * data.draw(st.sampled_from([1, 1, 9]))  # so long that the window moves on
    assert streamed(tokenizer, [], ids)[-1] == tokenizer.decode(ids, skip_special_tokens=True)
    prompt = data.draw(st.lists(token, max_size=6))
    assert streamed(tokenizer, prompt, ids)[-1] == _continuation(tokenizer, prompt, ids)


def ids_of(name: str, *tokens: str) -> list[int]:
    return [KINDS[name].convert_tokens_to_ids(token) for token in tokens]


def test_a_run_of_bytes_that_ends_as_no_utf8_is_as_unreadable_as_the_whole() -> None:
    """One bad byte turns all of its run into replacement characters, also those that had been a letter before."""
    name = "BPE with byte fallback"
    ids = ids_of(name, "▁a", "<0x41>", "<s>", "<0xE6>", "<0xBC>", "▁the")
    assert streamed(KINDS[name], [], ids)[-1] == "a" + 3 * "\N{REPLACEMENT CHARACTER}" + " the"
    ids = ids_of(name, "▁a", "<0xE6>", "<0xBC>", "<0xA2>", "▁the")
    assert streamed(KINDS[name], [], ids) == ["a", "a", "a", "a", "a漢 the", "a漢 the"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("blanks", [0, 1, 2, 40, 90])
def test_what_was_written_long_ago_is_still_as_in_the_whole(name: str, blanks: int) -> None:
    """The stream forgets early tokens: not in the middle of a character, nor where no text is left that it knows."""
    tokenizer = KINDS[name]
    if name == "BPE of bytes":
        words = tokenizer.convert_tokens_to_ids([*"ĠðŁĺĢaæ¼¢Ã©"])
    else:
        words = ids_of(name, *(["do", "##n", "'", "t", "."] if "Word" in name else ["▁a", "ed", "▁", "漢", "▁the"]))
    for shift in range(len(words)):
        ids = [*words[:shift], *words * 20, *ids_of(name, "<s>") * blanks, *words * 20]
        assert streamed(tokenizer, [], ids)[-1] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", KINDS)
def test_text_is_written_as_it_comes_and_costs_no_more_for_its_length(name: str, monkeypatch) -> None:
    tokenizer = KINDS[name]
    word = ids_of(name, {"W": "do", "B": "a", "U": "a"}[name[0]])
    if name == "BPE of bytes":
        word = tokenizer.convert_tokens_to_ids(["æ", "¼", "¢"])  # bytes of one character
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    whole = streamed(tokenizer, ids_of(name, "<s>"), word * 300)
    assert max(sorted(decoded)[:-2]) <= 70, "all but the two that end() checks it with"
    for count, text in enumerate(whole[:-1], 1):
        assert len(text) >= (count // len(word)) - 1
    assert len(decoded) < 2.2 * len(word) * 300


@pytest.mark.parametrize("prompt", ["once", "once \N{REPLACEMENT CHARACTER}"])
def test_a_completion_begins_with_the_space_between_it_and_the_prompt(prompt):
    words = ["<s>", "▁once", "▁upon", "▁a", "▁\N{REPLACEMENT CHARACTER}"]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    model.pre_tokenizer, model.decoder = Metaspace(), MetaspaceDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")
    assert tokenizer.decode([2, 3]) == "upon a"
    pieces: list[str] = []
    stream = _Stream(tokenizer, tokenizer(prompt)["input_ids"], pieces.append)
    for token in ([0], [2], [3]):
        stream.put(torch.tensor(token))
    stream.end()
    assert "".join(pieces) == stream.text == " upon a"


@pytest.mark.parametrize(
    ("name", "constant", "each"),
    [
        ("rope", 0, 2 * 2 * 2 * 4 * 8),  # layers, keys and values, heads, width, bytes
        ("m2rnn", None, 0),
        ("hybrid", None, 2 * 2 * 4 * 8),
    ],
)
def test_the_memory_of_a_sequence_is_that_of_its_cache(tmp_path, name, constant, each):
    model, _ = loaded(save(tmp_path, name))
    found = memory(model)
    assert found[1] == each
    with torch.inference_mode():
        cache = model.model(input_ids=torch.zeros(1, 50, dtype=torch.int64), use_cache=True).past_key_values
    tensors = [x for layer in cache.layers for x in layer.state if x is not None]
    assert found[0] + 50 * each == sum(x.numel() * x.element_size() for x in tensors)
    assert constant in (None, found[0])


def test_the_cache_of_another_model_is_counted_too(tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    model, tokenizer = loaded(save(tmp_path, GPT2LMHeadModel(config)))
    assert memory(model) == (0, 3 * 2 * 16 * 4)
    with pytest.raises(ValueError, match="learned positions for 32 tokens"):
        complete(model, tokenizer, "x" * 30, GREEDY)


def test_the_states_of_other_recurrent_models_are_counted(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    mamba = MambaConfig(state_size=4, expand=2, conv_kernel=3, time_step_rank=2, **sizes)
    model, _ = loaded(save(tmp_path, MambaForCausalLM(mamba)))
    assert memory(model) == (2 * 32 * (4 + 3) * 4, 0)


def run(*arguments, text=None):
    return CliRunner().invoke(cli.app, ["generate", *map(str, arguments)], input=text)


def test_standard_output_is_the_text_alone(tmp_path, folder):
    model, tokenizer = loaded(folder)
    expected = complete(model, tokenizer, "one two", GREEDY)[0].completion
    (tmp_path / "prompt.txt").write_text("one two")
    options = ["--temperature", 0, "--max-new-tokens", 12, "--ignore-eos", "--device", "cpu"]
    for done in (
        run(folder, "one two", *options),
        run(folder, "--file", tmp_path / "prompt.txt", *options),
        run(folder, *options, text="one two"),
    ):
        assert done.exit_code == 0, done.output
        assert done.stdout == expected
        said = done.stderr.splitlines()
        assert re.fullmatch(r"12 tokens in .* s: the first after .* s, then .* tokens/s", said[-2])
        constant, each = memory(model)
        assert said[-1].endswith(f"{each:,} bytes a token: {constant + 19 * each:,} bytes after 19 tokens")


def test_prompts_come_from_json_lines_or_lines(tmp_path, folder):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one\\ntwo"}\n\n{"prompt": "x", "id": 3}\n')
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    assert read_prompts(tmp_path / "prompts.jsonl") == ["one\ntwo", "x"]
    assert read_prompts(tmp_path / "prompts.txt") == ["one", "two"]
    odd = "one\u2028two\x85three"  # ends of lines for Python, but not for JSON
    (tmp_path / "odd.jsonl").write_text(json.dumps({"prompt": odd}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "odd.txt").write_text(f"{odd}\n\nx", encoding="utf-8")
    assert read_prompts(tmp_path / "odd.jsonl") == [odd]
    assert read_prompts(tmp_path / "odd.txt") == [odd, "", "x"]
    done = run(folder, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out.jsonl", "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "two"]
    longest = max(row["prompt_tokens"] + row["new_tokens"] for row in rows)
    assert done.stderr.rstrip().endswith(f"bytes after {longest} tokens")
    for text in ("{}", "[", '{"prompt": 3}', ""):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.jsonl"):
            read_prompts(tmp_path / "bad.jsonl")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt holds no prompt"):
        read_prompts(tmp_path / "empty.txt")


def test_a_byte_order_mark_is_no_prompt(tmp_path, folder):
    mark = "\ufeff"
    (tmp_path / "prompt.txt").write_bytes(f"{mark}one two".encode())
    (tmp_path / "prompts.txt").write_bytes(f"{mark}one{mark}\n{mark}two\n".encode())
    (tmp_path / "prompts.jsonl").write_bytes(f'{mark}{{"prompt": "one"}}\n'.encode())
    assert read_prompts(tmp_path / "prompts.txt") == [f"one{mark}", f"{mark}two"]
    assert read_prompts(tmp_path / "prompts.jsonl") == ["one"]
    options = ["--temperature", 0, "--max-new-tokens", 4, "--ignore-eos", "--device", "cpu"]
    model, tokenizer = loaded(folder)
    expected = complete(model, tokenizer, "one two", GenerationSettings(4, temperature=0, ignore_eos=True))[0]
    for done in (
        run(folder, "--file", tmp_path / "prompt.txt", *options),
        run(folder, *options, text=f"{mark}one two"),
    ):
        assert (done.exit_code, done.stdout) == (0, expected.completion), done.output
    for name in ("prompt.txt", "prompts.jsonl"):
        (tmp_path / name).write_bytes(f"{mark}one".encode("utf-16-be"))
        with pytest.raises(ValueError, match=rf"{name}: UTF-16, expected UTF-8: convert the file"):
            read_prompts(tmp_path / name)
    done = run(folder, *options, text=f"{mark}one".encode("utf-16-le"))
    assert done.exit_code == 2
    assert "standard input: UTF-16, expected UTF-8" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens 0: expected at least 1"),
        (["--temperature", "-1"], "temperature -1.0"),
        (["--top-p", "0"], "top_p 0.0"),
        (["--top-k", "0"], "top_k 0"),
        (["--min-p", "2"], "min_p 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty 0.0"),
        (["--file", "x"], "give one of a prompt, --file and --prompts"),
        (["--out", "x"], "--prompts and --out belong together"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--seed", "-1"], "seed -1: expected 0 to"),
    ],
)
def test_a_mistake_is_one_line(folder, options, message):
    done = run(folder, "one", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path, folder):
    (tmp_path / "prompts.txt").write_bytes(b"one \xff")
    (tmp_path / "one.txt").write_text("one")
    for options, message in (
        (["--file", "absent"], "absent: No such file"),
        (["--file", tmp_path / "prompts.txt"], "prompts.txt: not UTF-8: byte 0xff at 4"),
        (["--prompts", tmp_path / "prompts.txt", "--out", "x"], "prompts.txt: not UTF-8"),
        (["--prompts", tmp_path / "one.txt", "--out", tmp_path], f"{tmp_path} is a folder"),
    ):
        done = run(folder, *options)
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr


def test_a_prompt_that_the_model_cannot_read_is_one_line(tmp_path, folder):
    small = save(tmp_path / "small", "m2rnn", vocab_size=100)
    (tmp_path / "prompts.txt").write_text("A\nx\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n{"prompt": "\\ud800"}\n')
    out = ["--out", tmp_path / "out.jsonl"]
    for arguments, message in (
        ([small, "one"], "a vocabulary of 100 ids, and its tokenizer makes id 111"),
        (
            [small, "--prompts", tmp_path / "prompts.txt", *out],
            "a vocabulary of 100 ids, and its tokenizer makes id 120",
        ),
        ([folder, "one \udcff"], "prompt 'one \\udcff': not Unicode: half a surrogate pair at 4"),
        ([folder, "--prompts", tmp_path / "prompts.jsonl", *out], "prompt '\\ud800': not Unicode"),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert message in done.stderr


def test_a_model_needs_its_tokenizer(tmp_path):
    done = run(save(tmp_path, "m2rnn", None), "one")
    assert done.exit_code == 2
    assert "has no tokenizer" in done.stderr
