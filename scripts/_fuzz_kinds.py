"""The kinds of files that xent-quant reads: of each a small good one, made here, what reads it, and how it is damaged.

Nothing of it lies in the repository: random checkpoints of one or two layers, a small tokenizer, and what the commands
themselves make of them.
"""

import gzip
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from scripts import _mutations as mutations
from scripts._mutations import Mutate
from tests.conftest import SPECIALS, TINY, random_weights, write_checkpoint
from xent_quant import compilation
from xent_quant.cli.main import main
from xent_quant.errors import XentQuantError
from xent_quant.walk import job

CONFIG: dict[str, Any] = {
    **TINY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_experts": 2,
    "moe_top_k": 1,
    "num_shared_experts": 1,
    "max_position_embeddings": 64,
}
ENGLISH = "The king in the night, the thing in the thin inn. "
CHINESE = "你好,夜色。"
CHAT = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}{{ tools or '' }}"
MESSAGES = [
    {"role": "user", "content": "the thing"},
    {"role": "assistant", "content": [{"type": "text", "text": "in the night"}]},
]

Command = list[str]


@dataclass
class Case:
    """`target` is the file to be damaged, `seeds` good contents of it, `commands` what reads it. `out` is removed before each
    command, `reset` makes what else it needs."""

    target: Path
    seeds: list[bytes]
    commands: list[Command]
    out: Path
    reset: Callable[[], None] = lambda: None
    run: Callable[[Command], None] = main
    names: tuple[str, ...] = ()
    """What a refusal may name besides the target and its folder."""


SETTINGS = ("rope_scaling", "head_dim", "--seqlen")
"""What an export names of a config.json that is right, but that it cannot express."""


@dataclass(frozen=True)
class Kind:
    build: Callable[[Path], Case]
    mutate: Mutate
    share: float
    """Of the inputs, in comparison with other kinds: those that are refused at once can have more."""


def _run(*arguments: object) -> None:
    """A command that has to end well."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        if stopped.code not in (None, 0, 3):  # 3: a random model is out of tolerance
            raise RuntimeError(f"{arguments} ended with {stopped.code}") from stopped


def _model(root: Path, **config: Any) -> Path:
    """A checkpoint with every file that may lie beside the weights."""
    config = {**CONFIG, **config}
    folder = write_checkpoint(root / "model", config, random_weights(config))
    token = {"content": "<|startoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(index): {**token, "content": text, "special": True} for index, text in enumerate(SPECIALS)
            },
            "add_bos_token": False,
            "bos_token": token,
            "eos_token": "<|endoftext|>",
            "pad_token": "<pad>",
            "additional_special_tokens": ["<sep>"],
            "chat_template": CHAT,
            "model_max_length": 512,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {"bos_token": token, "eos_token": "<|endoftext|>", "additional_special_tokens": ["<sep>"]},
        "added_tokens.json": {"<|startoftext|>": 2, "<|endoftext|>": 3},
        "generation_config.json": {"bos_token_id": 2, "eos_token_id": [3, 0], "pad_token_id": 1, "temperature": 0.5, "top_k": 30},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlicense_link: x.org\nlanguage:\n- zh\n- en\ntags: [a, b]\ndate: 2024-01-31\n---\n# Model\n"
    )
    (root / "text.txt").write_text(ENGLISH * 20 + CHINESE * 20)
    (root / "chat.jsonl").write_text("\n".join(json.dumps({"messages": MESSAGES}) for _ in range(60)))
    return folder


def _exports(root: Path, model: Path) -> list[Command]:
    """Every way to read a checkpoint: inspected, exported to each format, and run for calibration."""
    fast = ["--method", "rtn", "--effort", "fast", "--threads", "1", "--json", "--output", str(root / "out")]
    return [
        ["inspect", str(model), "--json"],
        [str(model), "--type", "Q4_0", *fast],
        [str(model), "--format", "onnx", *fast],
        [str(model), "--format", "bnb", *fast[2:]],
        _calibrate(root, model, root / "text.txt"),
    ]


def _calibrate(root: Path, model: Path, text: Path) -> Command:
    small = ["--tokens", "120", "--seqlen", "20", "--json", "--output", str(root / "out" / "imatrix.gguf")]
    return ["calibrate", str(model), "--calib", str(text), *small]


def _validate(root: Path, model: Path, exported: Path, runtime: str = "torch") -> Command:
    suite = root / "suite.txt"
    suite.write_text(ENGLISH * 4)
    told = ["--suite-file", f"own={suite}", "--context", "16", "--max-tokens", "64", "--threads", "1"]
    return ["validate", str(exported), "--reference", str(model), "--runtime", runtime, *told, "--report", str(root / "report")]


def checkpoint_file(name: str, *contents: bytes, only: Sequence[int] = range(5), **config: Any) -> Callable[[Path], Case]:
    """A file of a checkpoint folder; `contents` are good ones besides what it is already."""

    def build(root: Path) -> Case:
        model = _model(root, **config)
        target = model / name
        seeds = [*([target.read_bytes()] if target.is_file() else []), *contents]
        return Case(target, seeds, [_exports(root, model)[n] for n in only], root / "out", names=(str(model), *SETTINGS))

    return build


def sharded(name: str) -> Callable[[Path], Case]:
    """Two shards with an index, or two pytorch shards."""

    def build(root: Path) -> Case:
        model = _model(root)
        weights = {name: torch.from_numpy(value) for name, value in random_weights(CONFIG).items()}
        (model / "model.safetensors").unlink()
        stem, suffix = ("model", "safetensors") if "safetensors" in name else ("pytorch_model", "bin")
        where = {tensor: f"{stem}-0000{1 + index % 2}-of-00002.{suffix}" for index, tensor in enumerate(weights)}
        for file in sorted(set(where.values())):
            part = {tensor: weights[tensor] for tensor in weights if where[tensor] == file}
            save_file(part, model / file) if suffix == "safetensors" else torch.save(part, model / file)
        (model / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
        target = model / name
        return Case(target, [target.read_bytes()], _exports(root, model)[:2], root / "out", names=(str(model),))

    return build


def pickled(root: Path) -> Case:
    model = _model(root)
    (model / "model.safetensors").unlink()
    weights = {name: torch.from_numpy(value).bfloat16() for name, value in random_weights(CONFIG).items()}
    target, seeds = model / "pytorch_model.bin", []
    for value in (weights, {name: torch.nn.Parameter(value) for name, value in weights.items()}):
        torch.save(value, target)
        seeds.append(target.read_bytes())
    return Case(target, seeds, _exports(root, model)[:2], root / "out", names=(str(model),))


def fp8(root: Path) -> Case:
    """Blocks of 32 × 32; the quantization_config of compressed-tensors is tried on the same weights."""
    model = _model(root)
    stored: dict[str, torch.Tensor] = {}
    for name, value in random_weights(CONFIG).items():
        weight = torch.from_numpy(value)
        if "_proj.weight" in name:
            stored[name] = weight.clamp(-400, 400).to(torch.float8_e4m3fn)
            rows, columns = weight.shape
            stored[f"{name}_scale_inv"] = torch.ones(-(-rows // 32), -(-columns // 32))
        else:
            stored[name] = weight
    save_file(stored, model / "model.safetensors")
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    group = {"weights": {"num_bits": 8, "type": "float", "block_structure": [32, 32], "strategy": "block"}, "targets": ["Linear"]}
    group["format"] = "float-quantized"
    tensors = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "quantization_status": "compressed"}
    seeds = [json.dumps({**CONFIG, "quantization_config": each}).encode() for each in (blocks, tensors)]
    return Case(model / "config.json", seeds, _exports(root, model)[:2], root / "out", names=(str(model),))


def _byte_level() -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet, "th", "the", "Ġt", "Ġth", "Ġthe"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    text: str = tokenizer.to_str()
    return text.encode()


def _unigram() -> bytes:
    words = ["▁", *"abcdefghijklmnopqrstuvwxyzT,.你好夜色。", "▁the", "in", "ing"]
    vocab = [*((token, 0.0) for token in SPECIALS), *((word, -float(rank)) for rank, word in enumerate(words, 1))]
    vocab += [(f"<0x{byte:02X}>", -99.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁")
    tokenizer.add_special_tokens(SPECIALS)
    text: str = tokenizer.to_str()
    return text.encode()


def sentencepiece(root: Path) -> Case:
    import sentencepiece

    model = _model(root)
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (model / name).unlink()
    seeds = []
    for kind, size in (("bpe", 300), ("unigram", 40)):
        made = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([ENGLISH, CHINESE] * 50),
            model_writer=made,
            model_type=kind,
            vocab_size=size,
            byte_fallback=kind == "bpe",
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
        )
        seeds.append(made.getvalue())
    command = [*_exports(root, model)[1], "--allow-tokenizer-mismatch"]
    return Case(model / "tokenizer.model", seeds, [command], root / "out", names=(str(model),))


def jinja(root: Path) -> Case:
    model = _model(root)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}))
    commands = [_calibrate(root, model, root / "chat.jsonl"), _exports(root, model)[1]]
    richer = (
        "{%- if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    )
    richer += "{{ strftime_now('%Y') }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
    richer += "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(1) }}"
    return Case(
        model / "chat_template.jinja", [CHAT.encode(), richer.encode()], commands, root / "out", names=(str(model), "chat")
    )


def text(name: str, *contents: bytes) -> Callable[[Path], Case]:
    """A file of text to calibrate on."""

    def build(root: Path) -> Case:
        model = _model(root)
        return Case(root / name, list(contents), [_calibrate(root, model, root / name)], root / "out")

    return build


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"text": ENGLISH * 3, "id": n, "tags": ["a"], "score": 0.5} for n in range(8)]
    return [*rows, {"text": None, "id": 8, "tags": [], "score": None}]


def _lines(rows: Sequence[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


CHATS = [{"messages": MESSAGES}] * 20
SHAREGPT = [{"conversations": [{"from": "human", "value": "the thing"}, {"from": "gpt", "value": "in the inn"}]}] * 20


def _csv() -> bytes:
    return ("id,text\n" + "\n".join(f'{n},"{ENGLISH}, ""quoted"" {CHINESE}"' for n in range(10)) + "\n").encode()


def parquet(root: Path) -> Case:
    import pyarrow
    from pyarrow import parquet as files

    seeds = []
    for rows, options in (
        (_rows(), {}),
        (_rows(), {"compression": "zstd", "use_dictionary": False}),
        (
            CHATS[:5] and [{"messages": [{"role": "user", "content": "the thing in the night " * 5}]}] * 10,
            {"compression": "gzip"},
        ),
        ([{"text": ENGLISH * 3}] * 10, {"compression": "none", "data_page_version": "2.0", "write_page_checksum": True}),
    ):
        made = io.BytesIO()
        files.write_table(pyarrow.Table.from_pylist(rows), made, **options)
        seeds.append(made.getvalue())
    return text("text.parquet", *seeds)(root)


def packed(name: str) -> Callable[[Path], Case]:
    def build(root: Path) -> Case:
        plain = (ENGLISH * 20).encode() if ".txt" in name else _lines(_rows())
        if name.endswith(".gz"):
            return text(name, gzip.compress(plain))(root)
        import pyarrow

        made = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(made, "zstd") as stream:
            stream.write(plain)
        return text(name, made.getvalue().to_pybytes())(root)

    return build


def _epub() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr(
            "META-INF/container.xml", '<container><rootfiles><rootfile full-path="o/c.opf"/></rootfiles></container>'
        )
        items = "".join(f'<item id="c{n}" href="c{n}.xhtml" media-type="application/xhtml+xml"/>' for n in range(3))
        spine = "".join(f'<itemref idref="c{n}"/>' for n in range(3))
        archive.writestr("o/c.opf", f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>")
        for n in range(3):
            archive.writestr(
                f"o/c{n}.xhtml", f"<html><head><title>x</title></head><body><p>{ENGLISH * 5}</p>&amp;<br/></body></html>"
            )
    return made.getvalue()


def imatrix(root: Path) -> Case:
    model, target = _model(root), root / "imatrix.gguf"
    _run(*_calibrate(root, model, root / "text.txt")[:-1], target)
    with_it = [str(model), "--type", "Q4_0", "--imatrix", str(target), "--effort", "fast", "--threads", "1", "--json"]
    legacy = (2).to_bytes(4, "little") + b"\x05\0\0\0blk.0\x01\0\0\0\x01\0\0\0" + bytes(8)
    commands = [[*with_it, "--output", str(root / "out")], [*with_it, "--dry-run", "--output", str(root / "out")]]
    return Case(target, [target.read_bytes()] * 9 + [legacy], commands[:1], root / "out")


def _gguf(root: Path, name: str = "Q4_0") -> tuple[Path, Path]:
    model = _model(root)
    _run(model, "--type", name, "--method", "rtn", "--effort", "fast", "--threads", 1, "--json", "--output", root / "exported")
    return model, root / "exported" / f"model-{name}.gguf"


def gguf(root: Path) -> Case:
    model, target = _gguf(root)
    commands = [
        ["inspect", str(target), "--json"],
        ["inspect", str(target), "--reference", str(model), "--json"],
        _validate(root, model, target),
    ]
    return Case(target, [target.read_bytes()], commands, root / "out")


def gguf_in_llama(root: Path) -> Case:
    """What passes for a model of ours goes to llama.cpp."""
    model, target = _gguf(root, "Q8_0")
    return Case(target, [target.read_bytes()], [_validate(root, model, target, "auto")], root / "out")


def onnx(name: str) -> Callable[[Path], Case]:
    def build(root: Path) -> Case:
        model = _model(root)
        _run(
            model,
            "--format",
            "onnx",
            "--method",
            "rtn",
            "--effort",
            "fast",
            "--threads",
            1,
            "--json",
            "--output",
            root / "exported",
        )
        folder = root / "exported" / "onnx"
        runtime = ["auto"] if name in ("tokenizer.json", "model.onnx.data") else ["torch", "auto"]
        commands = [["inspect", str(folder), "--json"], *(_validate(root, model, folder, each) for each in runtime)]
        target = folder / name
        return Case(target, [target.read_bytes()], commands, root / "out", names=(str(folder),))

    return build


def bnb(name: str) -> Callable[[Path], Case]:
    def build(root: Path) -> Case:
        model = _model(root)
        _run(model, "--format", "bnb", "--threads", 1, "--json", "--output", root / "exported")
        folder = root / "exported" / "bnb"
        commands = [["inspect", str(folder), "--json"], _validate(root, model, folder)]
        if name == "config.json":
            commands.append(_validate(root, model, folder, "auto"))
        target = folder / name
        return Case(target, [target.read_bytes()], commands, root / "out", names=(str(folder),))

    return build


def interrupted(name: str) -> Callable[[Path], Case]:
    """A file of the work folder that a run left when it was stopped behind its first layer; the same command goes on."""

    def build(root: Path) -> Case:
        model = _model(root, num_hidden_layers=2)
        fast = ["--type", "Q4_0", "--effort", "fast", "--threads", "1", "--json", "--calib", str(root / "text.txt")]
        command = [str(model), *fast, "--tokens", "120", "--seqlen", "20", "--output", str(root / "out")]
        if name.startswith("sums"):
            command = _calibrate(root, model, root / "text.txt")
        saves = job.Journal.save

        def stop(journal: Any) -> None:
            saves(journal)
            if (
                journal.done == 2 and journal.path.parent.parent == root / "out"
            ):  # not that of the probe of how much text it takes
                raise KeyboardInterrupt

        job.Journal.save = stop  # type: ignore[method-assign]
        try:
            with suppress(SystemExit):
                main(command)
        finally:
            job.Journal.save = saves  # type: ignore[method-assign]
        (work,) = (root / "out").glob(".xent-quant-*")
        shutil.copytree(root / "out", root / "kept")
        target = next(path for path in sorted(work.rglob("*")) if path.is_file() and path.name.startswith(name))

        def reset() -> None:
            shutil.copytree(root / "kept", root / "out")

        return Case(target, [target.read_bytes()], [command], root / "out", reset, names=(str(work), str(root / "out")))

    return build


def publishing(root: Path) -> Case:
    """A run that died while it published: what is read is the journal of the publication."""
    model = _model(root)
    command = [
        str(model),
        "--type",
        "Q4_0",
        "--method",
        "rtn",
        "--threads",
        "1",
        "--json",
        "--force",
        "--output",
        str(root / "out"),
    ]
    from xent_quant.storage.publication import Publication

    forward = Publication.roll_forward

    def dies(publication: Publication) -> None:
        shutil.copytree(root / "out", root / "kept")
        raise KeyboardInterrupt

    Publication.roll_forward = dies  # type: ignore[method-assign]
    try:
        with suppress(SystemExit):
            main(command)
    finally:
        Publication.roll_forward = forward  # type: ignore[method-assign]
    (target,) = (root / "kept").glob(".xent-quant-*/publication.json")
    shutil.rmtree(root / "out")

    def reset() -> None:
        shutil.copytree(root / "kept", root / "out")

    where = root / "out" / target.relative_to(root / "kept")
    return Case(where, [target.read_bytes()], [command], root / "out", reset, names=(str(root / "out"),))


def reference_cache(root: Path) -> Case:
    """What validate keeps of the checkpoint."""
    model, exported = _gguf(root)
    command = _validate(root, model, exported)
    _run(*command)
    (target,) = (root / "report").rglob("reference-*.npz")
    return Case(target, [target.read_bytes()], [command], root / "out")


def suite(root: Path) -> Case:
    model, exported = _gguf(root)
    command = _validate(root, model, exported)
    return Case(root / "suite.txt", [(root / "suite.txt").read_bytes()], [command], root / "out", names=("own",))


def card(root: Path) -> Case:
    """README.md of a folder that exports share, and which the next one adds to."""
    model, exported = _gguf(root)
    target = exported.parent / "README.md"
    command = [
        str(model),
        "--type",
        "Q8_0",
        "--method",
        "rtn",
        "--threads",
        "1",
        "--json",
        "--force",
        "--output",
        str(exported.parent),
    ]
    return Case(target, [target.read_bytes()], [command], root / "out", names=(str(exported.parent),))


def lora(root: Path) -> Case:
    model = _model(root)
    content = json.dumps({"base_model_name_or_path": "xverse/XVERSE-Ent-A4.2B", "peft_type": "LORA", "r": 8}).encode()
    return Case(model / "adapter_config.json", [content], _exports(root, model)[:1], root / "out", names=(str(model),))


KERNEL = "from xent_quant.compilation import jit\n\n\n@jit\ndef twice(x):\n    return 2 * x\n"


def kernels(suffix: str) -> Callable[[Path], Case]:
    """A compiled kernel on the disk; what reads it is the next process's first call."""

    def build(root: Path) -> Case:
        numba.config.CACHE_DIR = str(root)
        compilation.folder.cache_clear()
        module = root / "source" / "module.py"
        module.parent.mkdir()
        module.write_text(KERNEL)

        def run(command: Command) -> None:
            scope: dict[str, Any] = {}
            exec(compile(KERNEL, module, "exec"), scope)
            if scope["twice"](np.int64(21)) != 42:
                raise XentQuantError(f"{target}: computes something else")

        target = root
        run([])
        (target,) = (root / "xent-quant").rglob(f"*.{suffix}")
        return Case(target, [target.read_bytes()], [[]], root / "out", run=run)

    return build


JSON, BYTES, TEXT = mutations.as_json, mutations.as_bytes, mutations.as_text
CONTENTS = mutations.as_zip(mutations.one_of(BYTES, TEXT))
TEMPLATES = [
    json.dumps({"chat_template": [{"name": "default", "template": CHAT}, {"name": "tools", "template": CHAT}]}).encode(),
    json.dumps({"chat_template": CHAT, "bos_token": "<sep>", "add_bos_token": True, "add_eos_token": True}).encode(),
]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "attention_factor": 1.1}

SCALED = [
    {"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e5, "rope_type": "yarn"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 16, "eos_token_id": [3, 0]},
]

KINDS: dict[str, Kind] = {
    "config.json": Kind(checkpoint_file("config.json", *(json.dumps(CONFIG | more).encode() for more in SCALED)), JSON, 3),
    "config.json, quantised checkpoint": Kind(fp8, JSON, 1.5),
    "adapter_config.json": Kind(lora, JSON, 0.3),
    "model.safetensors": Kind(checkpoint_file("model.safetensors", only=(0, 1)), mutations.as_safetensors, 3),
    "model.safetensors.index.json": Kind(sharded("model.safetensors.index.json"), JSON, 2),
    "a shard of safetensors": Kind(sharded("model-00002-of-00002.safetensors"), mutations.as_safetensors, 2),
    "pytorch_model.bin": Kind(pickled, mutations.as_zip(BYTES), 2),
    "pytorch_model.bin.index.json": Kind(sharded("pytorch_model.bin.index.json"), JSON, 0.7),
    "tokenizer.json": Kind(
        checkpoint_file("tokenizer.json", _byte_level(), _unigram(), only=(1, 2, 4)), mutations.one_of(JSON, JSON, JSON, BYTES), 2
    ),
    "tokenizer.model": Kind(sentencepiece, BYTES, 1),
    "tokenizer_config.json": Kind(checkpoint_file("tokenizer_config.json", *TEMPLATES, only=(1, 2, 3)), JSON, 1),
    "special_tokens_map.json": Kind(checkpoint_file("special_tokens_map.json", only=(1, 2, 4)), JSON, 0.5),
    "added_tokens.json": Kind(checkpoint_file("added_tokens.json", only=(1, 2)), JSON, 0.5),
    "generation_config.json": Kind(checkpoint_file("generation_config.json", only=(1, 2, 3)), JSON, 0.5),
    "chat_template.jinja": Kind(jinja, TEXT, 1),
    "model card": Kind(checkpoint_file("README.md", only=(1, 2, 3)), TEXT, 0.5),
    "text .txt": Kind(
        text("text.txt", (ENGLISH * 20).encode(), (CHINESE * 90).encode("gb18030"), (CHINESE * 90).encode("utf-16")), TEXT, 1
    ),
    "text .jsonl": Kind(
        text("text.jsonl", _lines(_rows()), _lines(CHATS), _lines(SHAREGPT)), mutations.one_of(mutations.as_json_lines, TEXT), 3
    ),
    "text .json": Kind(
        text("text.json", json.dumps(_rows()).encode(), json.dumps({"data": CHATS}).encode(), json.dumps(SHAREGPT).encode()),
        mutations.one_of(JSON, JSON, TEXT),
        2,
    ),
    "text .csv": Kind(text("text.csv", _csv(), _csv().replace(b",", b";")), TEXT, 1.5),
    "text .parquet": Kind(parquet, BYTES, 4),
    "text .gz": Kind(packed("text.txt.gz"), BYTES, 1),
    "text .zst": Kind(packed("text.jsonl.zst"), BYTES, 1),
    "text .epub": Kind(text("text.epub", _epub()), CONTENTS, 2),
    "imatrix": Kind(imatrix, mutations.as_gguf, 3),
    "GGUF": Kind(gguf, mutations.as_gguf, 5),
    "GGUF in llama.cpp": Kind(gguf_in_llama, mutations.as_gguf, 1),
    "ONNX graph": Kind(onnx("model.onnx"), mutations.as_onnx, 5),
    "ONNX data": Kind(onnx("model.onnx.data"), BYTES, 0.2),
    "ONNX config.json": Kind(onnx("config.json"), JSON, 1),
    "ONNX tokenizer.json": Kind(onnx("tokenizer.json"), JSON, 0.5),
    "bitsandbytes config.json": Kind(bnb("config.json"), JSON, 1),
    "bitsandbytes weights": Kind(bnb("model.safetensors"), mutations.as_safetensors, 4),
    "journal": Kind(interrupted("journal.json"), BYTES, 0.2),
    "states of a run": Kind(interrupted("0."), BYTES, 0.1),
    "unfinished file of a run": Kind(interrupted("model-"), BYTES, 0.1),
    "sums of a run": Kind(interrupted("sums"), BYTES, 0.2),
    "journal of a publication": Kind(publishing, JSON, 0.5),
    "reference cache": Kind(reference_cache, BYTES, 0.2),
    "suite": Kind(suite, TEXT, 0.3),
    "card of an output folder": Kind(card, TEXT, 0.1),
    "compiled kernel": Kind(kernels("nbc"), BYTES, 0.1),
    "index of compiled kernels": Kind(kernels("nbi"), BYTES, 0.1),
}
