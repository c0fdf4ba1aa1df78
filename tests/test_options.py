"""Which options have an effect, what people type, and what the line says where it cannot be."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import gguf
import pytest

import xent_quant
from calibration import text
from tests.test_command import told
from xent_quant import pipeline
from xent_quant.checkpoint.hub import miniature
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.checkpoint.tokenizer import load_tokenizer
from xent_quant.cli.main import main
from xent_quant.errors import CalibrationError, ConfigError
from xent_quant.options import NEEDS, Options
from xent_quant.targets import Methods, exporters_of

ONNX, BNB = {"formats": ["onnx"]}, {"formats": ["bnb"]}
IDLE: list[tuple[dict[str, Any], list[str]]] = [
    ({**ONNX, "type": "Q8_0"}, ["--type Q8_0: has no effect with --format onnx", "--bits instead", "--format gguf"]),
    ({**BNB, "type": "Q8_0"}, ["--type Q8_0: has no effect with --format bnb"]),
    ({"bits": 4, "type": "Q8_0"}, ["--bits 4: has no effect beside --type", "drop one"]),
    ({"bits": "q4_k_m", "type": "Q8_0"}, ["--bits q4_k_m: has no effect beside --type"]),
    ({**ONNX, "bits": "q4_k_m"}, ["--bits q4_k_m: has no effect with --format onnx", "as a number"]),
    ({"formats": ["gguf", "bnb"], "bits": "q4_k_m", "type": "Q8_0"}, ["--bits q4_k_m: has no effect beside --type"]),
    ({**ONNX, "split_size": "4G"}, ["--split-size 4G: has no effect with --format onnx", "drop it", "--format gguf or bnb"]),
    ({**ONNX, "pad": "never"}, ["--pad never: has no effect with --format onnx"]),
    ({**ONNX, "tensor_types": ["a=Q8_0"]}, ["--tensor-type a=Q8_0: has no effect with --format onnx", "--format gguf"]),
    ({**BNB, "tensor_types": ["a=Q8_0"]}, ["--tensor-type a=Q8_0: has no effect with --format bnb"]),
    ({**ONNX, "allow_tokenizer_mismatch": True}, ["--allow-tokenizer-mismatch: has no effect with --format onnx"]),
    ({**BNB, "allow_tokenizer_mismatch": True}, ["--allow-tokenizer-mismatch: has no effect with --format bnb"]),
    ({"bnb_type": "fp4"}, ["--bnb-type fp4: has no effect with --format gguf", "--format bnb"]),
    ({**ONNX, "bnb_type": "nf4"}, ["--bnb-type nf4: has no effect with --format onnx"]),
    ({**BNB, "bits": 8, "bnb_type": "fp4"}, ["--bnb-type fp4: has no effect with --bits 8"]),
    *(
        ({**other, field: value}, [f"--{name} {value}: has no effect with --format", "or use --format onnx"])
        for other in ({}, BNB)
        for field, name, value in (
            ("onnx_dtype", "onnx-dtype", "fp16"),
            ("block_size", "block-size", 64),
            ("accuracy_level", "accuracy-level", 0),
            ("active_bits", "active-bits", 8),
        )
    ),
    ({"symmetric": False}, ["--asymmetric: has no effect with --format gguf", "--format onnx"]),
    ({"symmetric": True}, ["--symmetric: has no effect with --format gguf"]),
    ({**ONNX, "bits": 16, "block_size": 32}, ["--block-size 32: has no effect with --bits 16", "--active-bits 8"]),
    ({**ONNX, "bits": 16, "symmetric": False}, ["--asymmetric: has no effect with --bits 16"]),
    ({**ONNX, "bits": 16, "active_bits": 16, "accuracy_level": 0}, ["--accuracy-level 0: has no effect with --bits 16"]),
    ({**BNB, "imatrix": "a.gguf"}, ["--imatrix a.gguf: has no effect with --format bnb", "--format gguf or onnx"]),
    ({**BNB, "method": "imatrix"}, ["--method imatrix: has no effect with --format bnb", "--method gptq"]),
    ({"imatrix": "a.gguf", "drop_experts": "25%"}, ["--drop-experts 25%: has no effect beside --imatrix", "drop one of them"]),
    ({**BNB, "bits": 16, "method": "gptq"}, ["--method gptq: has no effect where weights are only rounded to floats"]),
    ({**BNB, "effort": "high"}, ["--effort high: has no effect with --format bnb"]),
    ({"method": "rtn", "effort": "high"}, ["--effort high: has no effect with --method rtn"]),
    ({"method": "rtn", "imatrix": "a.gguf"}, ["--imatrix a.gguf: has no effect with --method rtn"]),
    ({"method": "gptq", "imatrix": "a.gguf"}, ["--imatrix a.gguf: has no effect with --method gptq", "--method imatrix"]),
    ({"size": "1G", "bits": 4}, ["--bits 4: has no effect beside --size", "drop one"]),
    ({"size": "1G", "bits": "Q4_K_M", "formats": ["gguf", "onnx"]}, ["--bits Q4_K_M: has no effect beside --size"]),
    ({"size": "1G", "type": "Q8_0"}, ["--type Q8_0: has no effect beside --size"]),
    ({"max_kl": 0.01, "tensor_types": ["a=Q8_0"]}, ["--tensor-type a=Q8_0: has no effect beside --max-kl"]),
    ({"size": "1G", "max_kl": 0.01}, ["--max-kl 0.01: has no effect beside --size"]),
    ({"size": "1G", "fit": "1G"}, ["--fit 1G: has no effect beside --size"]),
    ({**BNB, "size": "1G", "bits": 16}, ["--bits 16: has no effect beside --size"]),
    ({**BNB, "ram": "1G"}, ["--ram 1G: has no effect with --format bnb", "--fit", "--format gguf"]),
    ({"formats": ["gguf", "onnx"], "ram": "1G"}, ["--ram 1G: has no effect with --format onnx", "--fit"]),
    ({**ONNX, "size": "1G", "bits": 8}, ["--bits 8: has no effect beside --size"]),
    ({**ONNX, "max_kl": 0.1, "active_bits": 8}, ["--active-bits 8: has no effect beside --max-kl"]),
    ({**ONNX, "fit": "1G", "ram": "1G"}, ["--ram 1G: has no effect with --format onnx", "--format gguf"]),
    ({**ONNX, "fit": "1G", "speed": 9.0}, ["--speed 9.0: has no effect with --format onnx", "--format gguf"]),
    ({**ONNX, "fit": "1G", "kv": "q8_0"}, ["--kv q8_0: has no effect with --format onnx"]),
    ({**ONNX, "fit": "1G", "vram_bandwidth": "9GB/s"}, ["--vram-bandwidth 9GB/s: has no effect with --format onnx"]),
    ({**BNB, "fit": "1G", "kv": "q8_0"}, ["--kv q8_0: has no effect with --format bnb"]),
    ({"size": "1G", "context": 512}, ["--context 512: has no effect without --fit"]),
    ({"kv": "q8_0"}, ["--kv q8_0: has no effect without --fit"]),
    ({"sensitivity": "a.json"}, ["--sensitivity a.json: has no effect without --size, --max-kl, --fit or --ram"]),
    ({"size": "1G", "ram": "1G"}, ["--ram 1G: has no effect beside --size"]),
    ({"ram": "1G", "max_kl": 0.1}, ["--max-kl 0.1: has no effect beside --ram"]),
    ({"fit": "auto", "type": "Q8_0"}, ["--type Q8_0: has no effect beside --fit"]),
    ({"size": "1G", "speed": 10.0}, ["--speed 10.0: has no effect without --fit or --ram"]),
    ({"ram": "1G", "vram_bandwidth": "360GB/s"}, ["--vram-bandwidth 360GB/s: has no effect without --fit"]),
    ({"fit": "1G", "ram_bandwidth": "80GB/s"}, ["--ram-bandwidth 80GB/s: has no effect without --ram"]),
    ({"type": "F16", "method": "gptq"}, ["--method gptq: has no effect where weights are only rounded to floats"]),
    ({"type": "F16", "tensor_types": ["output=bf16"], "tokens": "1k"}, ["--tokens 1k: has no effect where", "floats"]),
    ({**ONNX, "bits": 16, "imatrix": "a.gguf"}, ["--imatrix a.gguf: has no effect where", "floats"]),
    *(
        ({**where, field: value}, [f"--{field.replace('_', '-')} {value}: has no effect", why])
        for where, why in (
            ({"method": "rtn"}, "with --method rtn"),
            ({"imatrix": "a.gguf"}, "beside --imatrix"),
            (BNB, "with --format bnb"),
        )
        for field, value in (
            ("calib", "fiction"),
            ("calib_mix", "zh=1"),
            ("text_field", "body"),
            ("tokens", "1k"),
            ("seqlen", 64),
            ("seed", 1),
            ("device", "cpu"),
        )
    ),
]


def test_options_without_effect_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in IDLE:
        with pytest.raises(ConfigError) as refused:
            Options(**options)
        assert all(word in str(refused.value) for word in words), refused.value
    # In one line: not even the note that no model was named is said before.
    told(capsys, ["--format", "onnx", "--type", "Q8_0"], IDLE[0][1])
    told(capsys, ["--asymmetric"], ["--asymmetric: has no effect with --format gguf"])


def test_bits_are_of_the_formats_that_no_plan_chooses_for() -> None:
    assert Options(size="1G", bits=8, formats=["gguf", "onnx", "bnb"]).n_bits == 8


def _made(model: Path, options: dict[str, Any]) -> Any:
    """What exports depend on."""
    wanted = Options(**options)
    exporters = exporters_of(Checkpoint.open(model), wanted, Methods(wanted))
    return [(exporter.identity, exporter.summary, exporter.targets) for exporter in exporters]


@pytest.mark.parametrize("kind", ["gguf", "onnx", "bnb"])
def test_what_is_taken_changes_what_is_made(checkpoint, kind: str) -> None:
    """The other direction: what is not refused is not ignored."""
    model, base = checkpoint(intermediate_size=496), {"formats": [kind], "method": "rtn"}
    without = _made(model, base)
    refused = set()
    for option in (
        {"bits": 8},
        {"bnb_type": "fp4"},
        {"type": "Q8_0"},
        {"bits": "q8_0"},
        {"tensor_types": ["ffn_down_exps=Q8_0"]},
        {"pad": "never"},
        {"onnx_dtype": "fp32"},
        {"block_size": 32},
        {"accuracy_level": 0},
        {"symmetric": False},
        {"active_bits": 16},
        {"split_size": "300K"},
    ):
        try:
            Options(**base, **option)
        except ConfigError:
            refused |= set(option)
        else:
            assert _made(model, {**base, **option}) != without, option
    assert {"gguf": "onnx_dtype", "onnx": "type", "bnb": "symmetric"}[kind] in refused


def test_text_is_run_wherever_its_options_are_taken() -> None:
    taken = 0
    for formats in (["gguf"], ["onnx"], ["bnb"], ["gguf", "bnb"]):
        for method in ("auto", "rtn", "imatrix", "gptq"):
            for more in ({}, {"imatrix": Path("a")}, {"type": "F16"}, {"bits": 8}):
                for option in ({"tokens": "1k"}, {"seed": 1}, {"calib": ("fiction",)}, {"device": "cpu"}):
                    try:
                        wanted = Options(formats=formats, method=method, **more, **option)
                    except ConfigError:
                        continue
                    taken += 1
                    assert Methods(wanted).use_statistics
                    assert wanted.imatrix is None
    assert taken > 50


def test_sizes_are_what_their_units_say() -> None:
    for typed, nbytes in (("12GiB", 12 << 30), ("12G", 12 << 30), ("12 gb", 12 * 10**9), ("1.5TB", 1500 * 10**9), ("7", 7)):
        assert Options(size=typed).size_bytes == nbytes


def test_text_is_run_for_dropping_whatever_the_method() -> None:
    for more in ({"method": "rtn"}, BNB, {"type": "F16"}):
        with pytest.raises(ConfigError, match="--tokens 1k: has no effect"):
            Options(**more, tokens="1k")
        assert Options(**more, tokens="1k", device="cpu", drop_experts=1).n_tokens == 1000
        for computing in ({"device": "torch-cpu"}, {"vram": "8G"}):
            with pytest.raises(ConfigError, match="has no effect"):
                Options(**more, **computing, drop_experts=1)


@pytest.mark.parametrize(
    ("wanted", "of", "dropped"), [("25%", 64, 16), ("29 %", 100, 29), ("12.5%", 20, 2), (3, 64, 3), ("3", 4, 3)]
)
def test_experts_to_drop_are_a_number_or_a_share(wanted: int | str, of: int, dropped: int) -> None:
    assert Options(drop_experts=wanted).experts_dropped(of) == dropped


def test_statistics_serve_every_format_that_has_a_use_for_them() -> None:
    """Floats of one format do not keep another's weights from being measured."""
    assert Methods(Options(formats=["gguf", "onnx"], type="F16")).use_statistics
    assert Methods(Options(formats=["onnx"], bits=16, active_bits=8)).use_statistics
    assert not Methods(Options(formats=["gguf", "bnb"], type="bf16")).use_statistics


def test_every_option_is_said_to_need_something_or_not() -> None:
    always = {"formats", "output", "name", "threads", "force", "restart", "size"}
    assert {field.name for field in fields(Options)} == always | NEEDS.keys()
    assert not always & NEEDS.keys()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--bits q4_k_m", {"bits": "q4_k_m"}),
        ("--type q4_k_m -o there", {"type": ("q4_k_m",), "output": Path("there")}),
        ("--format GGUF --format Onnx --method GPTQ", {"formats": ("gguf", "onnx"), "method": "gptq"}),
        ("--bits 8 --tokens 0.5k -o there/my.gguf", {"bits": 8, "tokens": "0.5k", "output": Path("there/my.gguf")}),
    ],
)
def test_what_people_type_works(monkeypatch: pytest.MonkeyPatch, typed: str, meant: dict[str, Any]) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(pipeline, "plan", lambda model, **options: given.update(options) or ())
    monkeypatch.setattr(pipeline, "resources", lambda *_, **__: (_ for _ in ()).throw(SystemExit(0)))
    with pytest.raises(SystemExit, match="0"):
        main([*typed.split(), "--dry-run"])
    assert given == meant


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--bits 4.5", ["--bits", "4.5", "2, 3, 4, 5, 6, 8, 16"]),
        ("--format pdf", ["--format", "pdf", "gguf, onnx, bnb"]),
        ("--seed 1.6", ["--seed", "1.6", "whole number"]),
        (f"--seqlen {'9' * 5000}", ["--seqlen", "whole number"]),
        ("validate a.gguf --runtime ollama", ["--runtime", "ollama", "llama.cpp"]),
    ],
)
def test_values_that_are_none_are_usage_errors(capsys: pytest.CaptureFixture[str], typed: str, words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(typed.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line


WRONG: list[tuple[str, list[str]]] = [
    ("--tokens 128.6", ["--tokens", "128.6", "500k"]),
    (f"--tokens {'9' * 400}", ["--tokens", "500k"]),
    ("--bits nf5", ["nf5", "Q4_K_M"]),
    ("--drop-experts some", ["--drop-experts", "'some'", "16 or 25%"]),
    ("--drop-experts 0", ["--drop-experts", "'0'", "16 or 25%"]),
    ("--drop-experts 100%", ["--drop-experts", "'100%'", "16 or 25%"]),
    ("--drop-experts 13", ["--drop-experts 13: leaves 3 of 16 experts", "uses 4", "at most 12"]),
    ("--fit 8GiB --ram much", ["--ram", "'much'", "32GiB", "auto"]),
    ("--fit 8GiB --speed 0", ["--speed 0", "above 0"]),
    ("--fit 8GiB --vram-bandwidth 360Gbit/s", ["--vram-bandwidth", "'360Gbit/s'", "360GB/s"]),
    ("--ram 8GiB --ram-bandwidth 0", ["--ram-bandwidth", "'0'", "360GB/s"]),
    ("-o a/b.gguf --format onnx", ["--output a/b.gguf", "--format onnx", "--output a"]),
    ("-o a/b.gguf --format gguf --format bnb", ["--output a/b.gguf", "--format gguf, bnb", "--output a"]),
    ("-o b.gguf --type Q8_0 --type Q4_0", ["--output b.gguf", "several --type", "--output ."]),
    ("-o a/b.gguf --split-size 4G", ["--output a/b.gguf", "--split-size", "--output a"]),
    ("-o a/model.onnx --format onnx", ["--output a/model.onnx", "--output a"]),
    ("-o a/model.safetensors", ["--output a/model.safetensors", "GGUF", "--output a"]),
    ("--type Q8_0 --tensor-type ffn_gate_inp=Q4_0", ["--tensor-type 'ffn_gate_inp=Q4_0': has no effect", "routers"]),
    ("--type Q8_0 --tensor-type ffn=Q4_0 --tensor-type ffn_up=Q5_0", ["'ffn_up=Q5_0': has no effect", "first rule"]),
]


def test_what_cannot_be_is_one_line_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, words in WRONG:
        told(capsys, [miniature(), *typed.split()], words)


def test_the_output_may_be_the_gguf_file(checkpoint, tmp_path: Path) -> None:
    folder = checkpoint()
    for name in ("my model.gguf", "other.GGUF"):
        output = tmp_path / "out" / name
        with pytest.raises(SystemExit, match="0"):
            main([str(folder), "--type", "q8_0", "--method", "rtn", "--output", str(output), "--name", "Told"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "my model.Modelfile",
        "my model.gguf",
        "other.Modelfile",
        "other.gguf",
    ]
    assert gguf.GGUFReader(tmp_path / "out" / "my model.gguf").fields["general.name"].contents() == "Told"
    assert "FROM ./my model.gguf\n" in (tmp_path / "out" / "my model.Modelfile").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## my model\n" in card
    assert "## other\n" in card
    assert "llama-completion -m 'my model.gguf' " in card
    (tmp_path / "folder.gguf").mkdir()
    assert Options(output=tmp_path / "folder.gguf").folder == tmp_path / "folder.gguf"


def test_options_of_the_text_that_it_has_no_use_for(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("Once upon a time. " * 99)
    (tmp_path / "chats.jsonl").write_text('{"body": "Once upon a time."}\n' * 99)
    novel, chats = str(tmp_path / "novel.txt"), str(tmp_path / "chats.jsonl")
    assert len(text.sources((novel,), "zh=3", False)) == 1  # bundled text may fill up
    with pytest.raises(CalibrationError, match="--calib-mix webcc: has no effect"):
        text.sources(("fiction",), "zh=3,webcc=2", False)
    assert len(text.sources(("fiction", novel), "zh=3,fiction=2", False)) == 3
    tokenizer = load_tokenizer(miniature())
    with pytest.raises(CalibrationError, match="--text-field body: has no effect"):
        text.load(text.sources((novel, "webcc"), None, False), tokenizer, tokens=200, length=40, text_field="body")
    for calib in (chats, str(tmp_path)):
        found = text.load(text.sources((calib,), None, False), tokenizer, tokens=200, length=40, text_field="body")
        assert len(found.windows)


def test_python_takes_the_same() -> None:
    with pytest.raises(ConfigError, match="--split-size 4G: has no effect with --format onnx"):
        xent_quant.plan(miniature(), formats=["ONNX"], split_size="4G")
    with pytest.raises(ConfigError, match=r"--bits 7: choose 2, 3, 4, 5, 6, 8, 16$"):
        xent_quant.plan(miniature(), bits=7)
    named = Options(formats="GGUF", type="Q8_0", calib="fiction", tensor_types="a=Q8_0")
    assert (named.formats, named.type, named.calib, named.tensor_types) == (("gguf",), ("Q8_0",), ("fiction",), ("a=Q8_0",))
    assert Options(formats=["gguf", "gguf"], output="a.gguf").folder == Path()
    everything = {field.name: field.default for field in fields(Options)} | {"type": None, "calib": []}
    with pytest.raises(ConfigError, match="has no effect"):
        Options(**everything)  # also where what is given is the default
    assert Options(calib=[], imatrix=None, type=None, force=False, device="auto", method="rtn").given.keys() == {
        "calib", "imatrix", "type", "force", "device", "method",
    }  # fmt: skip
