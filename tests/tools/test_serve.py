"""``transformers serve`` answers a chat request with a saved model, which it finds by its shim."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from tests.models.fresh import run, save_tokenizer
from tests.models.small import make

SERVE = """
import json, socket, sys, time, urllib.request
from transformers.cli.serve import Serve
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
server = Serve(sys.argv[1], trust_remote_code=True, device="cpu", port=port, non_blocking=True)
assert "m2rnn" in sys.modules
request = {"model": sys.argv[1], "messages": [{"role": "user", "content": "w3 w4"}], "max_tokens": 5}
while not server.server.started:
    time.sleep(0.05)
for stream in (False, True):
    body = json.dumps(request | {"stream": stream}).encode()
    call = urllib.request.Request(f"http://localhost:{port}/v1/chat/completions", body)
    call.add_header("Content-Type", "application/json")
    print("ANSWER", json.dumps(urllib.request.urlopen(call).read().decode()))
server.kill_server()
"""


@pytest.mark.skipif(not is_serve_available(), reason="needs fastapi, openai and uvicorn")
def test_the_server_answers_a_chat_request_on_a_cpu(tmp_path: Path) -> None:
    folder, model = tmp_path / "model", make("hybrid", torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    expected = model.generate(torch.tensor([[3, 4]]), max_new_tokens=5, do_sample=False)[0, 2:]
    lines = run(SERVE, folder, home=tmp_path).splitlines()  # the server's own log among them
    whole, streamed = (json.loads(line.removeprefix("ANSWER ")) for line in lines if line.startswith("ANSWER "))
    answer = json.loads(whole)["choices"][0]["message"]["content"]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(pieces) == answer
