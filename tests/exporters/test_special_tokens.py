"""Special tokens and chat templates from all of a checkpoint's files; judged by gguf-py's SpecialVocab and stock llama.cpp."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

import xent_quant
from exporters.gguf import tokenizer_check
from exporters.hub_files import generation_config, tokenizer_files
from tests import families as of_families
from tests.exporters import tokenizer_families as families
from xent_quant.checkpoint import special_tokens
from xent_quant.checkpoint.chat_template import chat_template
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.errors import CheckpointError
from xent_quant.validation.llama_cpp import Vocabulary

PAD, BEGIN, END = families.SPECIALS
TEMPLATE = "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|turn|>\n{% endfor %}"
WHEN_SENT = "{{ bos_token }}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.byte_level(tmp_path_factory.mktemp("trained") / "model", families.splits(families.QWEN2), size=600)


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint folder with a chat's tokens, whose config.json names no special token."""
    value = json.loads((trained / "tokenizer.json").read_text("utf-8"))
    size = len(value["model"]["vocab"])
    for number, text in enumerate(("<|turn|>", "<|call_done|>", "<|stop|>", "<tool>")):
        value["added_tokens"].append(
            value["added_tokens"][0] | {"id": size + number, "content": text, "special": text != "<tool>"}
        )
    families.saved(tmp_path / "model", value)
    config = json.loads((tmp_path / "model/config.json").read_text())
    for role in ("bos", "eos", "pad"):
        config.pop(f"{role}_token_id")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def put(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(known | values, ensure_ascii=False), "utf-8")


def edited(folder: Path, **values: Any) -> None:
    put(folder, "tokenizer.json", **values)


def template(before: str | None, after: str | None) -> dict[str, Any]:
    """A post-processor that puts tokens around a text."""
    ids = {PAD: 0, BEGIN: 1, END: 2}
    single = [
        *([{"SpecialToken": {"id": before, "type_id": 0}}] if before else []),
        {"Sequence": {"id": "A", "type_id": 0}},
        *([{"SpecialToken": {"id": after, "type_id": 0}}] if after else []),
    ]
    tokens = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (before, after) if text}
    return {"type": "TemplateProcessing", "single": single, "pair": [*single], "special_tokens": tokens}


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if name.startswith("tokenizer.")}


def ours(folder: Path, target: Path) -> dict[str, Any]:
    return keys(families.vocabulary_only(families.loaded(folder), target))


def stock_converter(folder: Path, target: Path) -> dict[str, Any]:
    """What llama.cpp's converter writes of special tokens and templates."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    writer = gguf.GGUFWriter(target, "llama")
    gguf.SpecialVocab(folder, n_vocab=size).add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return keys(target)


CASES: dict[str, Any] = {
    "tokenizer_config": lambda f: put(f, "tokenizer_config.json", bos_token=BEGIN, eos_token={"content": END}, pad_token=PAD),
    "config": lambda f: put(f, "config.json", bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "tokenizer_config before config": lambda f: (
        put(f, "tokenizer_config.json", bos_token=BEGIN, eos_token="<|turn|>"),
        put(f, "config.json", bos_token_id=0, eos_token_id=2, pad_token_id=0),
    ),
    "asked to add": lambda f: put(
        f, "tokenizer_config.json", bos_token=BEGIN, eos_token=END, add_bos_token=True, add_eos_token=False
    ),
    "post-processor": lambda f: (
        put(f, "tokenizer_config.json", bos_token=BEGIN, eos_token=END),
        edited(f, post_processor=template(BEGIN, END)),
    ),
    "post-processor ends with another": lambda f: (
        put(f, "tokenizer_config.json", bos_token=BEGIN, eos_token="<|turn|>"),
        edited(f, post_processor=template(BEGIN, END)),
    ),
    "template": lambda f: put(f, "tokenizer_config.json", bos_token=BEGIN, eos_token=END, chat_template=TEMPLATE),
    "templates": lambda f: put(
        f,
        "tokenizer_config.json",
        bos_token=BEGIN,
        eos_token=END,
        chat_template=[{"name": "default", "template": TEMPLATE}, {"name": "tool-use", "template": WHEN_SENT}],
    ),
    "template file": lambda f: (
        put(f, "tokenizer_config.json", bos_token=BEGIN, eos_token=END),
        (f / "chat_template.jinja").write_text(TEMPLATE),
    ),
    "template files": lambda f: (
        put(f, "tokenizer_config.json", bos_token=BEGIN, eos_token=END),
        (f / "chat_template.jinja").write_text(TEMPLATE),
        (f / "additional_chat_templates").mkdir(),
        (f / "additional_chat_templates/rag.jinja").write_text(WHEN_SENT),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_keys_are_those_of_the_stock_converter(folder: Path, tmp_path: Path, case: str) -> None:
    CASES[case](folder)
    found, wanted = ours(folder, tmp_path / "ours.gguf"), stock_converter(folder, tmp_path / "stock.gguf")
    assert wanted
    assert {name: found.get(name) for name in wanted} == wanted
    extra = {name for name in found if name.endswith("_token_id") or "chat_template" in name} - set(wanted)
    # llama.cpp takes the token of id 11 for a BOS that is not named; and an end that config.json alone names is one, too.
    assert extra <= {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eot_token_id"}


def test_every_end_of_a_list_ends_generation(folder: Path, tmp_path: Path) -> None:
    put(folder, "config.json", bos_token_id=1, eos_token_id=[2, 600])
    put(folder, "generation_config.json", eos_token_id=[2, 600, 601])
    spec = families.loaded(folder)
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "v.gguf")) as stock:
        assert stock.special("eos") == 2
        assert stock.special("eot") == 600
        assert [token for token in range(stock.vocab_size) if stock.ends(token)] == [2, 600, 601]
    put(folder, "generation_config.json", eos_token_id=[2, 600, 601, 602])
    assert any("'<|stop|>'" in note for note in families.loaded(folder).notes)


def test_a_chat_ends_with_its_own_token(folder: Path, tmp_path: Path) -> None:
    """The tokenizer's EOS ends a turn, the model's list a text: neither is lost."""
    put(folder, "tokenizer_config.json", eos_token="<|turn|>")
    put(folder, "config.json", eos_token_id=[2])
    with Vocabulary(families.vocabulary_only(families.loaded(folder), tmp_path / "v.gguf")) as stock:
        assert stock.special("eos") == 600
        assert stock.ends(2)
        assert stock.ends(600)


def test_tokens_that_the_post_processor_alone_names(folder: Path, tmp_path: Path) -> None:
    edited(folder, post_processor=template(BEGIN, END))
    check_whole_encoding(folder, tmp_path / "v.gguf")
    spec = families.loaded(folder)
    assert (spec.special["bos"], spec.special["eos"], spec.add_bos, spec.add_eos) == (1, 2, True, True)


def check_whole_encoding(folder: Path, target: Path) -> None:
    """transformers and stock llama.cpp: a text with what is added around it, and special tokens inside."""
    judge = AutoTokenizer.from_pretrained(folder, tokenizer_type=None)
    with Vocabulary(families.vocabulary_only(families.loaded(folder), target)) as stock:
        for text in ("Hello, world", f"{BEGIN}user\nHi<|turn|>\n", "你好<tool>x</tool>"):
            assert stock.tokenize(text, add_special=True, parse_special=True) == judge(text)["input_ids"]


def test_without_a_post_processor_nothing_is_added(folder: Path, tmp_path: Path) -> None:
    put(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", bos_token=BEGIN, eos_token=END)
    check_whole_encoding(folder, tmp_path / "v.gguf")


def test_added_tokens_of_the_other_files(folder: Path, tmp_path: Path) -> None:
    put(
        folder,
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|late|>",
        added_tokens_decoder={
            "604": {"content": "<|late|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
            "605": {"content": "<soft>", "special": False, "lstrip": False, "rstrip": False, "normalized": False},
        },
    )
    put(folder, "config.json", vocab_size=606)
    check_whole_encoding(folder, tmp_path / "v.gguf")
    judge = AutoTokenizer.from_pretrained(folder)
    spec, text = families.loaded(folder), "a<|late|>b<soft>c"
    assert spec.special["eos"] == 604
    with Vocabulary(families.vocabulary_only(spec, tmp_path / "v.gguf")) as stock:
        assert stock.tokenize(text, parse_special=True) == judge(text)["input_ids"]
        assert 605 in stock.tokenize(text, parse_special=False)
    assert load_tokenizer(folder).encode(text).ids == judge(text)["input_ids"]


def test_added_tokens_json(folder: Path) -> None:
    put(folder, "added_tokens.json", **{"<extra>": 604})
    put(folder, "config.json", vocab_size=605)
    spec = families.loaded(folder)
    assert spec.tokens[604] == "<extra>"
    assert 604 in load_tokenizer(folder).encode("a<extra>b").ids


def test_special_tokens_map(folder: Path) -> None:
    put(folder, "special_tokens_map.json", bos_token={"content": BEGIN}, eos_token=END, additional_special_tokens=["<tool>"])
    spec = families.loaded(folder)
    assert (spec.special["bos"], spec.special["eos"]) == (1, 2)
    assert spec.types[603] == gguf.TokenType.CONTROL


def test_a_missing_bos_is_not_made_up(folder: Path, tmp_path: Path) -> None:
    """llama.cpp would take token 11 for it."""
    put(folder, "config.json", eos_token_id=2)
    with Vocabulary(families.vocabulary_only(families.loaded(folder), tmp_path / "v.gguf")) as stock:
        assert stock.special("bos") == 2
        assert stock.tokenize("a", add_special=True) == stock.tokenize("a")


def test_two_tokens_before_a_text_are_told(folder: Path) -> None:
    twice = template(BEGIN, None)
    twice["single"].insert(0, twice["single"][0])
    edited(folder, post_processor=twice)
    assert any("before a text" in note for note in families.loaded(folder).notes)


def test_contradictions_are_told(folder: Path) -> None:
    put(folder, "tokenizer_config.json", bos_token=BEGIN, add_bos_token=False)
    edited(folder, post_processor=template(BEGIN, None))
    spec = families.loaded(folder)
    assert not spec.add_bos
    assert any("add_bos_token is False" in note for note in spec.notes)


def test_spaces_that_hugging_face_takes_from_around_a_token_are_refused(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    value["added_tokens"][-2]["rstrip"] = value["added_tokens"][-2]["lstrip"] = True
    edited(folder, added_tokens=value["added_tokens"])
    with pytest.raises(Exception, match="around special tokens"):
        tokenizer_check.verify(folder, families.loaded(folder))


def test_templates_are_read_by_llama_cpp(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates/tool_use.jinja").write_text(WHEN_SENT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert chat_template(folder) == [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": WHEN_SENT},
    ]
    with Vocabulary(families.vocabulary_only(families.loaded(folder), tmp_path / "v.gguf")) as stock:
        assert stock.chat_template() == TEMPLATE
        assert stock.chat_template("tool_use") == WHEN_SENT


def test_no_template(folder: Path) -> None:
    assert chat_template(folder) is None


@pytest.mark.parametrize("damaged", [3, [1], [{"name": "x"}], ["x"], {"default": 3}, "\ud800"])
def test_a_damaged_template_is_one_line(folder: Path, damaged: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": damaged}))
    told = r"tokenizer_config\.json.*(not valid JSON|chat_template)"  # a lone surrogate is refused on reading
    with pytest.raises(CheckpointError, match=told):
        chat_template(folder)


def test_roles_of_a_folder(folder: Path) -> None:
    put(folder, "tokenizer_config.json", unk_token="<|stop|>")
    found = special_tokens.read(folder, load_tokenizer(folder), 604)
    assert found.ids["unk"] == 602
    assert found.ends == ()


def test_folders_carry_every_end_and_template(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(num_hidden_layers=1, eos_token_id=[3, 0], bos_token_id=None)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/rag.jinja").write_text(WHEN_SENT)
    opened = Checkpoint.open(source)
    assert opened.architecture.eos_token_id == 3
    assert generation_config(opened)["eos_token_id"] == [3, 0]
    for name, data in tokenizer_files(opened).items():
        (tmp_path / name).write_bytes(data)
    judge = AutoTokenizer.from_pretrained(tmp_path)
    assert judge.eos_token_id == 3
    assert judge.chat_template == {"default": TEMPLATE, "rag": WHEN_SENT}


def test_an_exported_file_holds_all_of_it(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(num_hidden_layers=1, eos_token_id=[3, 0])
    (source / "chat_template.jinja").write_text(TEMPLATE * 2000)
    done = xent_quant.quantize(source, method="rtn", type="Q8_0", output=tmp_path / "out")
    with Vocabulary(done.files[0]) as stock:
        assert stock.chat_template() == TEMPLATE * 2000
        assert stock.ends(0)
        assert stock.special("bos") == 2


def test_generation_is_the_checkpoints_and_else_the_authors(checkpoint, tmp_path: Path) -> None:
    source = checkpoint(num_hidden_layers=1)
    assert generation_config(Checkpoint.open(source))["repetition_penalty"] == 1.1
    llama = of_families.write(tmp_path / "llama", "llama")
    assert "repetition_penalty" not in generation_config(Checkpoint.open(llama))
    told = {"repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "do_sample": True, "min_p": None}
    (source / "generation_config.json").write_text(json.dumps(told))
    xent_quant.quantize(source, method="rtn", type="Q8_0", output=tmp_path / "out", name="Tiny")
    wanted = ["repeat_penalty 1.05", "temperature 0.7", "top_k 20", "top_p 0.9", "num_ctx 512"]
    lines = (tmp_path / "out" / "Tiny-Q8_0.Modelfile").read_text().splitlines()
    assert [line.removeprefix("PARAMETER ") for line in lines if line.startswith("PARAMETER")] == wanted
    command = "llama-completion -m Tiny-Q8_0.gguf -no-cnv --repeat-penalty 1.05 --temp 0.7 --top-k 20 --top-p 0.9 -c 512 -p"
    assert command in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_every_card_says_whether_there_is_a_template(template: str | None, checkpoint, tmp_path: Path) -> None:
    source = checkpoint(num_hidden_layers=1)
    if template:
        (source / "chat_template.jinja").write_text(template)
    options = {"method": "rtn", "formats": ["gguf", "onnx", "bnb"], "bits": 8, "output": tmp_path / "out"}
    xent_quant.quantize(source, **options)
    said = "It has a chat template." if template else "A base model: it continues text, there is no chat template."
    cards = [*(tmp_path / "out").rglob("README.md")]
    assert len(cards) == 3
    assert all(said in card.read_text() for card in cards)
