"""Conversations: rendered as transformers' own apply_chat_template does, and what is done without a template."""

import json
from pathlib import Path
from typing import Any

import pytest

from calibration.chat import ChatTemplate, messages
from calibration.documents import documents
from calibration.notes import Notes
from calibration.text import Source, load
from tests.conftest import small_tokenizer
from xent_quant.errors import CalibrationError, CheckpointError

CHATML = """{%- if tools %}
never
{%- endif %}
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {% generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- '<|im_end|>' + eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant{% endif %}
{{ {'a': '<夜>'} | tojson }}{{ missing }}{{ messages[0].get('name', 'none') }}"""
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be kind.", "name": None},
    {"role": "user", "content": "夜色 <b>?"},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "  Yes.\n"},
]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def model(folder: Path, template: Any, **config: Any) -> ChatTemplate:
    folder.mkdir(exist_ok=True)
    tokens = {"bos_token": "<|startoftext|>", "eos_token": {"content": "<|endoftext|>", "lstrip": False}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": template, **config}))
    return ChatTemplate(folder)


def of_transformers(template: str, conversation: list[dict[str, Any]]) -> str:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer(), bos_token="<|startoftext|>", eos_token="<|endoftext|>", chat_template=template
    )
    return str(tokenizer.apply_chat_template(conversation, tokenize=False))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


@pytest.mark.parametrize("template", [CHATML, STRICT.replace("raise_exception", "strftime_now")])
def test_rendered_as_transformers_does(tmp_path: Path, template: str) -> None:
    conversation, _ = messages(TALK)
    wanted = of_transformers(template, TALK)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    assert model(tmp_path, template).render(conversation, 10**6) == wanted
    assert model(tmp_path, named).render(conversation, 10**6) == wanted
    (tmp_path / "chat_template.jinja").write_text(template)
    assert model(tmp_path, "not this one").render(conversation, 10**6) == wanted


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_both_layouts_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    chat = model(tmp_path / "model", STRICT)
    openai = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    wanted = of_transformers(STRICT, openai)
    assert wanted == "<|startoftext|>[user] Hi\n[assistant] Hello\n"
    for name, talk in (("messages", openai), ("conversations", SHAREGPT)):
        path = write(tmp_path / f"{name}{suffix}", [{"id": 1, name: talk}, {"id": 2, name: None}, {"id": 3, name: talk}])
        notes = Notes()
        assert list(documents(path, chat=chat, notes=notes)) == [wanted, wanted]
        said = "\n".join(notes.lines())
        assert f"no field 'text'; '{name}' is taken" in said
        assert "1 row without text (null)" in said
        assert list(documents(path, name, chat=chat)) == [wanted, wanted]
    path = write(tmp_path / f"c{suffix}", [{"messages": openai, "conversations": SHAREGPT}])
    with pytest.raises(CalibrationError, match="'messages', 'conversations'"):
        list(documents(path, chat=chat))


def test_parts_of_messages(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "two"}]
    path = write(
        tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]}]
    )
    notes = Notes()
    assert list(documents(path, chat=model(tmp_path, STRICT), notes=notes)) == ["<|startoftext|>[user] one\ntwo\n[assistant] \n"]
    assert "1 part of messages left out" in "\n".join(notes.lines())


def test_without_a_template_lines_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"conversations": SHAREGPT}])
    for chat in (None, ChatTemplate(tmp_path), model(tmp_path, None)):
        notes = Notes()
        assert list(documents(path, chat=chat, notes=notes)) == ["User: Hi\nAssistant: Hello"]
        assert 'as lines "Role: text"' in "\n".join(notes.lines())


def test_refused_conversations_are_counted_and_broken_templates_named(tmp_path: Path) -> None:
    good, bad = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hi"}]
    path = write(tmp_path / "a.jsonl", [{"messages": bad}, {"messages": good}, {"messages": bad}])
    notes = Notes()
    assert len(list(documents(path, chat=model(tmp_path, STRICT), notes=notes))) == 1
    assert "2 conversations left out that the model's chat template refuses (roles must alternate)" in "\n".join(notes.lines())
    write(path, [{"messages": bad}])
    hostile = {
        STRICT: "refuses every conversation",
        "{% if %}": "cannot be read",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}": "refuses every",
        "{{ 1 / 0 }}": "refuses every",
        "{{ messages[0].content.x.y }}": "refuses every",
        "{{ messages.append(1) }}": "refuses every",
        "{% for i in range(10**9) %}x{% endfor %}": "refuses every",
        "{{ '%s' % " + "(" * 400 + ")" * 400 + "}}": "chat template",
        "{{ strftime_now(1) }}": "refuses every",
    }
    for template, message in hostile.items():
        with pytest.raises(CalibrationError, match=message):
            list(documents(path, chat=model(tmp_path, template)))
    endless = model(tmp_path, "{% for i in range(99999) %}{% for i in range(99999) %}x{% endfor %}{% endfor %}")
    assert len(next(documents(path, chat=endless, longest=1000))) == 1000
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        list(documents(path, chat=ChatTemplate(tmp_path)))
    for value in ([1], [{"role": "user"}, 3], [{"from": "human"}]):
        write(path, [{"messages": value}])
        with pytest.raises(CalibrationError, match="line 1: field 'messages' holds a list"):
            list(documents(path))


def test_windows_of_conversations_have_one_bos_each_and_notes(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "the night " * 30}]
    path = write(tmp_path / "a.jsonl", [{"messages": talk}, {"messages": talk}])
    found = [Source("a", path)]
    made = load(found, small_tokenizer(), tokens=10_000, length=8, bos=2, chat=model(tmp_path, STRICT))
    assert (made.windows == 2).sum() == 2
    assert made.windows[0, 1] != 2
    assert any("'messages' is taken" in note for note in made.notes)
    there = 2 * len(small_tokenizer().encode(of_transformers(STRICT, talk)).ids)
    assert made.windows.size == there // 8 * 8


def test_the_day_is_always_the_same(tmp_path: Path) -> None:
    """Or the same text would be other tokens tomorrow, and a run that was interrupted today could not go on."""
    assert model(tmp_path, "{{ strftime_now('%d %B %Y') }}").render(TALK, 99) == "01 November 2026"
