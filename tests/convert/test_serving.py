"""An export served by transformers answers requests of its clients."""

import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from pictures import picture
from tiny_models import vivid_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_vitp import convert_checkpoint

COMMAND = [sys.executable, "-m", "transformers.cli.transformers"]
QUESTION = {"type": "text", "text": "How many trees are there?"}
MAX_NEW_TOKENS = 12
SECONDS = 120  # timeout of the start, which takes about ten


@pytest.fixture(scope="module")
def export(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    for part in vivid_model(tokenizer):
        part.save_pretrained(folder / "run")
    return convert_checkpoint(folder / "run", folder / "for_serving", "internvl")


@pytest.fixture(scope="module")
def server(export):
    """URL of a server of the export, whose path is relative to the server's folder."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        root = f"http://localhost:{probe.getsockname()[1]}"
    command = [*COMMAND, "serve", export.name, "--device", "cpu", "--port", root.rpartition(":")[2]]
    with open(export.parent / "server.log", "w+") as log:
        process = subprocess.Popen(
            command, cwd=export.parent, stdout=log, stderr=subprocess.STDOUT, env=environment(is_offline=True)
        )
        try:
            wait_until_it_listens(process, root, log)
            yield root
        finally:
            process.terminate()
            process.wait()


def environment(is_offline: bool) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": str(int(is_offline)), "OMP_NUM_THREADS": "1"}


def wait_until_it_listens(process, root, log):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{root}/health", timeout=5):
            return
        time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"The server does not listen: {log.read()[-2000:]}")


def generated(export, content) -> torch.Tensor:
    """Return the tokens of the answer generated in this process."""
    model, processor = AutoModelForImageTextToText.from_pretrained(export), AutoProcessor.from_pretrained(export)
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :]


def ask(root, model, image) -> dict:
    """Return the reply to a request of OpenAI's client with an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    body = {
        "model": model,
        "temperature": 0,
        "max_tokens": MAX_NEW_TOKENS,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, QUESTION]}],
    }
    request = urllib.request.Request(
        f"{root}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as reply:
        return json.load(reply)


@pytest.mark.slow
def test_transformers_serve_equals_generate(export, server):
    decode = AutoProcessor.from_pretrained(export).decode
    answers = []
    for image in (picture(130, 60), picture(60, 130, seed=1)):
        tokens = generated(export, [{"type": "image", "image": image}, QUESTION])
        reply = ask(server, export.name, image)
        assert reply["choices"][0]["message"]["content"] == decode(tokens, skip_special_tokens=True)
        assert reply["usage"]["completion_tokens"] == len(tokens)
        answers.append(tokens.tolist())
    assert answers[0] != answers[1]


@pytest.mark.slow
def test_transformers_chat_equals_generate(export, server):
    tokens = generated(export, [QUESTION])
    typed = [QUESTION["text"], *(["n"] if len(tokens) == MAX_NEW_TOKENS else []), "!save", "!exit"]
    options = [f"max_new_tokens={MAX_NEW_TOKENS}", "do_sample=False"]
    result = subprocess.run(
        [*COMMAND, "chat", export.name, server, *options],
        cwd=export.parent,
        input="\n".join(typed) + "\n",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment(is_offline=False),  # offline, its client would not contact this machine either
    )
    assert result.returncode == 0, result.stderr[-2000:]
    saved = json.loads(next((export.parent / "chat_history" / export.name).glob("*.json")).read_text())
    question, answer = saved["chat_history"]
    assert question == {"role": "user", "content": QUESTION["text"]}
    said = AutoProcessor.from_pretrained(export).decode(tokens, skip_special_tokens=True)
    assert answer["content"] == re.sub(r"<(/*)(\w*)>", r"\<\1\2\>", said)  # escaped for Markdown
