"""llama-server over HTTP with what we export; the right texts come from Hugging Face's tokenizer and a slow forward pass."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import xent_quant
from tests.reference.forward import forward
from tests.stock.programs import Post, Programs
from xent_quant.checkpoint.hub import miniature

pytestmark = pytest.mark.stock

TEMPLATE = (
    "{% for message in messages %}<|startoftext|>{{ message['role'] }}\n{{ message['content'] }}<|endofknowledge|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|startoftext|>assistant\n{% endif %}"
)
ENDS = [3, 5]
"""<|endoftext|>, and <|endofknowledge|> for the end of a turn, as generation_config.json says."""
MESSAGES = [{"role": "user", "content": "The old lamp went out. 夜色"}]
COUNT = 12
GREEDY = {"temperature": 0, "seed": 1, "cache_prompt": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with a chat template, and two tokens to end with."""
    path = tmp_path_factory.mktemp("server") / "chat"
    shutil.copytree(miniature(), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": ENDS, "pad_token_id": 1}))
    return path


@pytest.fixture(scope="module")
def post(stock: Programs, folder: Path) -> Iterator[Post]:
    """The server of our F32 file."""
    (file,) = xent_quant.quantize(folder, type="F32", output=folder.parent / "out").exports
    with stock.server(file, "-c", "512", "-np", "1") as send:
        yield send


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def continued(folder: Path, ids: list[int]) -> list[int]:
    """The COUNT likeliest tokens after `ids`, one after another, none of which ends the text."""
    weights = {name: value.float().numpy() for name, value in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    found: list[int] = []
    for _ in range(COUNT):
        found.append(int(forward(weights, config, ids + found)[-1].argmax()))
    assert not set(found) & set(ENDS)
    return found


def text_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], more: list[int]) -> str:
    return tokenizer.decode(ids + more)[len(tokenizer.decode(ids)) :]


def test_completion_is_the_models(post: Post, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = "The old lamp in the window"
    ids = tokenizer.encode(prompt)
    wanted = continued(folder, ids)
    found = post("/completion", {"prompt": prompt, "n_predict": COUNT, "return_tokens": True, **GREEDY})
    assert found["tokens_evaluated"] == len(ids)
    assert found["tokens"] == wanted
    assert found["content"] == text_after(tokenizer, ids, wanted)
    assert found["stop_type"] == "limit"


def test_chat_applies_the_template(post: Post, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The prompt is Hugging Face's, token by token, special ones being one each; none of them is in the answer."""
    prompt = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt)
    assert ids.count(2) == 2
    assert post("/apply-template", {"messages": MESSAGES})["prompt"] == prompt
    assert post("/tokenize", {"content": prompt, "parse_special": True})["tokens"] == ids
    wanted = continued(folder, ids)
    found = post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": COUNT, **GREEDY})
    assert found["usage"]["prompt_tokens"] == len(ids)
    (choice,) = found["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == text_after(tokenizer, ids, wanted)


@pytest.mark.parametrize("token", ENDS)
def test_every_end_stops(post: Post, token: int) -> None:
    """Once it is the likeliest token; its text is not in the answer."""
    body: dict[str, Any] = {"logit_bias": [[token, 1000.0]], **GREEDY}
    found = post("/completion", {"prompt": "The old lamp", "n_predict": COUNT, "return_tokens": True, **body})
    assert (found["stop_type"], found["content"]) == ("eos", "")
    found = post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": COUNT, **body})
    (choice,) = found["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


@pytest.mark.parametrize("token", [0, 1, 2, 4])
def test_no_other_special_token_stops_or_is_seen(post: Post, token: int) -> None:
    body: dict[str, Any] = {"logit_bias": [[token, 1000.0]], **GREEDY}
    found = post("/completion", {"prompt": "The old lamp", "n_predict": COUNT, "return_tokens": True, **body})
    assert (found["stop_type"], found["content"]) == ("limit", "")
    assert found["tokens"] == [token] * COUNT
