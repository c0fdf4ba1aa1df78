"""Whole validations: real runtimes, exports damaged on purpose, figures against independent computations."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import xent_quant
from exporters.gguf import export as gguf_export
from tests.conftest import TINY, random_weights, write_checkpoint
from tests.reference.forward import forward
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ValidationError, XentQuantError
from xent_quant.model.streaming import StreamingModel
from xent_quant.progress import Silent
from xent_quant.validation import gates, measures, reference, scoring, suites
from xent_quant.validation.gguf_source import GGUFFile, GGUFSource
from xent_quant.validation.html import SENTENCES, page
from xent_quant.validation.llama_cpp import LlamaCpp
from xent_quant.validation.reference import references, tokenize
from xent_quant.validation.report import Report
from xent_quant.validation.suites import Suite, bundled
from xent_quant.validation.validate import validate
from xent_quant.validation.weights import compare

Export = Callable[..., Path]


def beginning(name: str) -> Suite:
    """The first documents of a bundled suite: more than the tokens that are scored here, and quickly tokenised."""
    return Suite(name, bundled(name).text[:6000])


SHORT = {"suites": [beginning("XfictionEN"), beginning("XconversationZH")], "max_tokens": 1024, "threads": 1}


def run(file: Path, model: Checkpoint, cache: Path, **options: Any) -> Report:
    return validate(file, model, **{**SHORT, "cache": cache, **options})


@pytest.fixture(scope="module")
def sound(export: Export, mini: Checkpoint, cache: Path) -> Report:
    """Of an undamaged Q4_K_M, in llama.cpp."""
    return run(export("Q4_K_M"), mini, cache, command="xent-quant validate <x>")


@pytest.fixture(scope="module")
def lossless(export: Export, mini: Checkpoint, cache: Path) -> Report:
    """Of an F32 file, in llama.cpp."""
    return run(export("F32"), mini, cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"])
def test_all_six_suites_are_within_the_tier(export: Export, mini: Checkpoint, cache: Path, kind: str) -> None:
    found = run(export(kind, defaults=True), mini, cache, suites=suites.choose(), max_tokens=None)
    assert found.verdict == "within", [(suite.name, suite.ratio, suite.kl, suite.top1) for suite in found.suites]
    assert found.tier.name == f"{kind[1]}bit"


def test_a_sound_export_is_not_out(sound: Report, mini: Checkpoint) -> None:
    assert sound.verdict != "out"
    assert not sound.suspicions
    assert sound.cross_verdict == "within"
    assert all(suite.tokenizer == 1.0 for suite in sound.suites)
    assert sum(sound.coverage[0]) == mini.architecture.experts_per_token * 512 * len(sound.suites)
    assert all(0 < error < 0.15 for error in sound.layer_errors)


def test_float_export_has_the_reference_perplexity(lossless: Report, export: Export, mini: Checkpoint, cache: Path) -> None:
    """Nothing is lost in F32: the runtime, the exact path and the reference agree to four digits and more."""
    exact = run(export("F32"), mini, cache, runtime="torch")
    for one, two in zip(lossless.suites, exact.suites, strict=True):
        assert one.ratio.value.value == pytest.approx(1, abs=1e-4)
        assert two.ratio.value.value == pytest.approx(1, abs=1e-6)
        assert two.kl.value.value == pytest.approx(0, abs=1e-9)
        assert two.top1.value.value == 1
    assert max(tensor.error for tensor in lossless.tensors) == 0


def test_perplexity_is_llama_perplexitys(lossless: Report, export: Export) -> None:
    """The definition of stock llama-perplexity, run by llama.cpp on its own token ids."""
    with LlamaCpp(export("F32"), context=512, threads=1, exact=True) as llama:
        for suite, result in zip(SHORT["suites"], lossless.suites, strict=True):
            wanted, count = llama.perplexity(llama.tokenize(suite.text)[: SHORT["max_tokens"]])
            assert result.tokens == count
            assert result.reference_perplexity == pytest.approx(wanted, rel=5e-5)
            assert result.perplexity.value == pytest.approx(wanted, rel=2e-4)  # half-precision KV cache


@pytest.mark.parametrize("bos", [False, True])
def test_reference_equals_an_independent_computation(tmp_path: Path, bos: bool) -> None:
    """Token by token in float64, with nothing of ours: log-likelihood, bytes, distribution."""
    config = {**TINY, "num_hidden_layers": 1}
    folder = write_checkpoint(tmp_path / "model", config, random_weights(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": bos}))
    text = "the thing in the night, 你好夜色 and the king sing in the evening. 夜色你好!\n" * 3
    context = 16
    suites = tokenize(Checkpoint.open(folder), [Suite("own", text)], context, None)
    (got,) = references(Checkpoint.open(folder), suites, tmp_path / "cache")

    tokenizer, weights = Tokenizer.from_file(str(folder / "tokenizer.json")), load_file(folder / "model.safetensors")
    ids = ([2] if bos else []) + tokenizer.encode(text).ids
    nlls, n_bytes = [], 0
    spelled = [_spelled(tokenizer, token) for token in ids]
    for window, start in enumerate(range(0, len(ids) - context + 1, context)):
        seen = ids[start : start + context]
        if bos:
            seen = [2, *seen[1:]]
        logits = forward(weights, config, seen)
        for position in range(context // 2, context - 1):
            row = logits[position] - logits[position].max()
            log_p = row - math.log(math.fsum(np.exp(row)))
            nlls.append(-log_p[ids[start + position + 1]])
            n_bytes += spelled[start + position + 1]
            index = window * (context // 2 - 1) + position - context // 2
            top = np.argsort(-log_p, kind="stable")[: measures.TOP_K]
            np.testing.assert_allclose(got.summary.log_p[index], log_p[top], atol=1e-4)
    np.testing.assert_allclose(got.nll.ravel(), nlls, atol=1e-4)
    assert measures.perplexity(got.nll) == pytest.approx(math.exp(math.fsum(nlls) / len(nlls)), rel=1e-5)
    assert abs(suites[0].n_bytes - n_bytes) <= 4 * len(suites[0].windows)  # a byte token counts with its character


def _spelled(tokenizer: Tokenizer, token: int) -> int:
    piece = tokenizer.id_to_token(token)
    return 1 if piece.startswith("<0x") else 0 if piece.startswith("<|") else len(piece.replace("▁", " ").encode())


def test_kl_divergence_is_within_2_percent_of_the_full_one(export: Export, mini: Checkpoint, cache: Path) -> None:
    """On real distributions: both models' whole logits against the figure that is reported."""
    found = run(export("Q4_K_M"), mini, cache, runtime="torch")
    texts = tokenize(mini, SHORT["suites"], 512, 1024)
    for text, result in zip(texts, found.suites, strict=True):
        windows, (positions, _) = torch.from_numpy(text.windows), measures.scored(512)
        whole = []
        for source in (mini, GGUFSource(GGUFFile(export("Q4_K_M")), mini.architecture)):
            model = StreamingModel(source)
            whole.append(model.logits(model.hidden_states(windows)[:, positions].flatten(0, 1)).double().log_softmax(-1))
        full = float((whole[0].exp() * (whole[0] - whole[1])).sum(-1).mean())
        assert result.kl.value.value == pytest.approx(full, rel=0.02)


def _tensor(path: Path, name: str) -> tuple[int, int]:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return int(tensor.data_offset), int(tensor.n_bytes)


def _zero_expert(path: Path) -> None:
    offset, nbytes = _tensor(path, "blk.1.ffn_down_exps.weight")
    with path.open("r+b") as stream:
        stream.seek(offset + 5 * nbytes // 16)
        stream.write(bytes(nbytes // 16))


def _swap_gate_and_up(path: Path) -> None:
    places = [_tensor(path, f"blk.0.ffn_{which}_exps.weight") for which in ("gate", "up")]
    with path.open("r+b") as stream:
        data = []
        for offset, nbytes in places:
            stream.seek(offset)
            data.append(stream.read(nbytes))
        for (offset, _), other in zip(places, reversed(data), strict=True):
            stream.seek(offset)
            stream.write(other)


def _double_a_scale(path: Path) -> None:
    """The scale of one block in the middle of a shared projection; `d` begins a block, but ends one of Q6_K."""
    name = "blk.0.ffn_up_shexp.weight"
    offset, nbytes = _tensor(path, name)
    kind = next(tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    block = gguf.GGML_QUANT_SIZES[kind][1]
    at = offset + nbytes // block // 2 * block + (208 if kind.name == "Q6_K" else 0)
    with path.open("r+b") as stream:
        stream.seek(at)
        scale = np.frombuffer(stream.read(2), "<f2") * np.float16(2)
        stream.seek(at)
        stream.write(scale.tobytes())


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "one expert's down projection zeroed": (_zero_expert, ("model.layers.1.mlp.experts.5.down_proj.weight",)),
    "gate and up swapped": (_swap_gate_and_up, ("model.layers.0.mlp.experts.", "gate_proj", "up_proj")),
    "one scale doubled": (_double_a_scale, ("model.layers.0.mlp.shared_experts.up_proj.weight",)),
}


def _check_named(found: Report, names: tuple[str, ...]) -> None:
    assert found.verdict == "out"
    named = [suspicion.tensor.name for suspicion in found.suspicions]
    assert all(any(name in one for one in named) for name in names)
    assert all(any(name in one for name in names) for one in named), "a sound tensor is called damaged"
    assert names[0] in page(found)
    assert len(found.damage) == (2 if "gate_proj" in names else 1), "experts that share their damage share a line"


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_exports_are_out_and_the_tensor_is_named(
    export: Export, mini: Checkpoint, cache: Path, tmp_path: Path, damage: tuple[Callable[[Path], None], tuple[str, ...]]
) -> None:
    change, names = damage
    file = Path(shutil.copy(export("Q4_K_M"), tmp_path))
    change(file)
    _check_named(run(file, mini, cache, runtime="torch", suites=[beginning("XfictionEN")], max_tokens=1024), names)


def test_padding_that_is_not_zero_is_named(export: Export, mini: Checkpoint, tmp_path: Path) -> None:
    """480 columns are padded to 512, in the second block of 256 of each row."""
    file = Path(shutil.copy(export("Q4_K_M"), tmp_path))
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(16)]
    offset, nbytes = _tensor(file, "blk.1.ffn_down_exps.weight")
    assert not any(map(GGUFSource(GGUFFile(file), mini.architecture).padding, names))
    with file.open("r+b") as stream:
        stream.seek(offset + 6 * nbytes // 16 - 100)  # in the last row of expert 5
        stream.write(bytes([0x3C]) * 100)
    source = GGUFSource(GGUFFile(file), mini.architecture)
    assert [source.padding(name) > 0 for name in names] == [expert == 5 for expert in range(16)]
    assert "padding holds values" in str(gates.suspicious(compare(names[5], mini, source), 16))


def test_padding_of_types_without_zero_is_their_gates_and_ups(export: Export, mini: Checkpoint) -> None:
    source = GGUFSource(GGUFFile(export("Q1_0")), mini.architecture)
    assert source.type("model.layers.1.mlp.experts.5.down_proj.weight") == "Q1_0"
    for projection in ("gate", "up", "down"):
        assert source.padding(f"model.layers.1.mlp.experts.5.{projection}_proj.weight") == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named_beside_what_calibration_moves(
    export: Export,
    mini: Checkpoint,
    cache: Path,
    tmp_path: Path,
    kind: str,
    damage: tuple[Callable[[Path], None], tuple[str, ...]],
) -> None:
    """With method and effort of the command line, in stock llama.cpp: GPTQ moves weights further than rounding does."""
    change, names = damage
    file = Path(shutil.copy(export(kind, defaults=True), tmp_path))
    change(file)
    _check_named(run(file, mini, cache), names)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Q8_0", {"method": "rtn", "effort": "fast"}),
        pytest.param("Q8_0", {}, marks=pytest.mark.slow),
        pytest.param("Q4_K_M", {}, marks=pytest.mark.slow),
    ],
)
def test_unpermuted_q_and_k_are_named(
    mini: Checkpoint, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(gguf_export, "rotary_rows", lambda rows, rows_per_head: rows)
    file = xent_quant.quantize(None, type=kind, output=tmp_path, **options).files[0]
    found = run(file, mini, cache)
    assert found.verdict == "out"
    assert "out" in {suite.verdict for suite in found.suites}
    named = {suspicion.tensor.name for suspicion in found.suspicions}
    assert named == {f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in (0, 1) for which in "qk"}


def test_a_runtime_that_computes_something_else_is_out(export: Export, mini: Checkpoint, cache: Path, monkeypatch: Any) -> None:
    """The bytes are right, what runs them is not: only the cross-check can tell where to look."""
    honest = LlamaCpp.logits
    monkeypatch.setattr(LlamaCpp, "logits", lambda self, ids, first=0: honest(self, ids, first) * np.float32(1.2))
    found = run(export("Q8_0"), mini, cache)
    assert found.cross_verdict == found.verdict == "out"
    assert found.weights_verdict == "within"


def test_reference_is_computed_once_for_each_model_and_text(export: Export, tmp_path: Path, monkeypatch: Any) -> None:
    config = {**TINY, "num_hidden_layers": 1}
    folder = write_checkpoint(tmp_path / "model", config, random_weights(config))
    file = xent_quant.quantize(folder, method="rtn", type="Q8_0", output=tmp_path / "out", effort="fast").files[0]
    own, cache = Suite("own", "the king in the night sing. " * 60), tmp_path / "cache"
    computed: list[int] = []
    original = reference.stream
    monkeypatch.setattr(reference, "stream", lambda model, *rest, **more: computed.append(1) or original(model, *rest, **more))
    settings: dict[str, Any] = {"cache": cache, "context": 64, "runtime": "torch", "threads": 1}

    def once(text: Suite = own, **changes: Any) -> Report:
        return validate(file, Checkpoint.open(folder), [text], **{**settings, **changes})

    first, second = once(), once()
    assert len(computed) == 1
    assert first.suites == second.suites
    once(context=32)
    once(Suite("own", own.text[::-1]))
    assert len(computed) == 3
    for path in cache.iterdir():  # damaged: computed anew
        path.write_bytes(path.read_bytes()[:200])
    assert once().suites == first.suites
    assert len(computed) == 4
    write_checkpoint(folder, config, random_weights(config, seed=1))
    assert once().suites != first.suites
    assert len(computed) == 5


def test_json_and_page_hold_everything(sound: Report) -> None:
    value = json.loads(json.dumps(sound.to_json(), allow_nan=False))
    schema = json.loads((Path(xent_quant.validation.report.__file__).parent / "report.schema.json").read_text())
    _conforms(value, schema, schema)
    text = page(sound)
    assert text.index(SENTENCES[sound.verdict]) < text.index("<table")
    for part in ("XconversationZH", "prefers-color-scheme: dark", "experts down", "xent-quant validate &lt;x&gt;", "xllamacpp"):
        assert part in text
    assert "http" not in text
    assert "<script" not in text


def _conforms(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "report") -> None:
    """The part of JSON Schema that report.schema.json uses."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return _conforms(value, option, root, where)
            except AssertionError:
                continue
        raise AssertionError(f"{where}: {value!r} fits none of {schema['anyOf']}")
    kinds = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "null": type(None)}
    assert isinstance(value, kinds[schema["type"]]), f"{where}: {value!r} is no {schema['type']}"
    assert value == schema.get("const", value), where
    assert value in schema.get("enum", [value]), where
    if isinstance(value, dict):
        properties = schema.get("properties")
        if properties is not None:
            assert set(value) == set(properties), f"{where}: {set(value) ^ set(properties)}"
        for key, item in value.items():
            _conforms(item, properties[key] if properties is not None else schema["additionalProperties"], root, f"{where}.{key}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            _conforms(item, schema["items"], root, f"{where}[{index}]")
    return None


def test_a_page_of_figures_that_are_all_their_bounds(mini: Checkpoint, cache: Path) -> None:
    """Of a copy that is judged exactly: the axis has no length then. And a long name is cut where there is no room."""
    suite = Suite("my-favourite-novel-chapter-1", beginning("XfictionEN").text)
    found = run(mini.path, mini, cache, runtime="torch", tolerance="ppl=1,kld=0.001,top1=1", suites=[suite])
    assert found.verdict == "within"
    text = page(found)
    assert ">my-favourite-no…</text>" in text
    assert "<title>my-favourite-novel-chapter-1: " in text


def test_one_window_cannot_decide(export: Export, mini: Checkpoint, cache: Path) -> None:
    found = run(export("Q8_0"), mini, cache, runtime="torch", suites=[beginning("XfictionEN")], max_tokens=512)
    assert found.verdict == "undecided"
    assert any("One window" in note for note in found.notes)
    assert found.suites[0].tokenizer is None  # of a GGUF it is llama.cpp that has one
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    _conforms(value, *[json.loads((Path(xent_quant.validation.report.__file__).parent / "report.schema.json").read_text())] * 2)
    page(found)


def test_a_validation_that_goes_on_tells_of_all_layers(
    export: Export, mini: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"runtime": "torch", "suites": [beginning("XfictionEN")], "max_tokens": 512}
    whole = run(export("Q8_0"), mini, cache, **options)
    assert len(whole.coverage) == mini.architecture.num_layers
    original = reference.replace_bytes

    def stopping(path: Path, content: bytes) -> None:
        if path.name == "layer-1.npy":
            raise KeyboardInterrupt
        original(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(reference, "replace_bytes", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(export("Q8_0"), mini, cache, **options)
    again = run(export("Q8_0"), mini, cache, **options)
    assert (again.coverage, again.suites) == (whole.coverage, whole.suites)


def test_a_text_is_read_as_far_as_it_is_scored(mini: Checkpoint) -> None:
    long = Suite("long", bundled("XfictionEN").text)
    (part,), (whole,) = (tokenize(mini, [long], 64, limit) for limit in (640, None))
    assert len(part.text) < len(whole.text) / 4
    assert part.windows.tolist() == whole.windows[:10].tolist()
    assert part.n_bytes < whole.n_bytes
    assert (part.targets == whole.targets[:10]).all()


def _other_model(file: Path, mini: Checkpoint, tmp_path: Path) -> Report:
    config = {**TINY, "hidden_size": 256}
    return run(
        file, Checkpoint.open(write_checkpoint(tmp_path / "other", config, random_weights(config))), tmp_path, max_tokens=None
    )


def _truncated(file: Path, mini: Checkpoint, tmp_path: Path) -> Report:
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-100_000])
    return run(short, mini, tmp_path)


def _longer_values(file: Path, mini: Checkpoint, tmp_path: Path) -> Report:
    """llama.cpp would end the process with such a key."""
    key, raw = b"attention.value_length", bytearray(file.read_bytes())
    raw[raw.index(key) + len(key) + 4] += 1
    (tmp_path / "long.gguf").write_bytes(raw)
    return run(tmp_path / "long.gguf", mini, tmp_path)


def _not_gguf(file: Path, mini: Checkpoint, tmp_path: Path) -> Report:
    (tmp_path / "text.gguf").write_text("hello" * 1000)
    return run(tmp_path / "text.gguf", mini, tmp_path)


def _no_data_file(file: Path, mini: Checkpoint, tmp_path: Path) -> Report:
    (tmp_path / "model.onnx").write_bytes(b"")
    return run(tmp_path, mini, tmp_path)


def _short_text(file: Path, mini: Checkpoint, tmp_path: Path) -> Report:
    return run(file, mini, tmp_path, suites=[Suite("brief", "Just a word.")])


def _wrong_runtime(file: Path, mini: Checkpoint, tmp_path: Path) -> Report:
    return run(file, mini, tmp_path, runtime="onnxruntime")


@pytest.mark.parametrize(
    ("attempt", "words"),
    [
        (_other_model, "the reference needs"),
        (_truncated, "short.gguf: .*truncated"),
        (_longer_values, r"long\.gguf: bailingmoe\.attention\.value_length is 65, the reference needs 64"),
        (_not_gguf, "not a GGUF file"),
        (_no_data_file, "model.onnx.data: missing"),
        (_short_text, "suite brief: .* fewer than one window"),
        (_wrong_runtime, "--runtime onnxruntime: does not run gguf"),
    ],
)
def test_what_cannot_be_compared_is_refused(export: Export, mini: Checkpoint, tmp_path: Path, attempt: Any, words: str) -> None:
    with pytest.raises(XentQuantError, match=words) as caught:
        attempt(export("Q8_0"), mini, tmp_path)
    assert "\n" not in str(caught.value)


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken:
        name, version, vocab_size = "a runtime", "1", 3

        def tokenize(self, text: str) -> list[int]:
            return []

        def logits(self, ids: list[int], first: int = 0) -> np.ndarray:
            return np.full((len(ids) - first, 3), np.nan, np.float32)

    with pytest.raises(ValidationError, match=r"m\.gguf: a runtime computes NaN or infinite logits with it \(window 0\)"):
        next(scoring.run(Broken(), tmp_path / "m.gguf", np.zeros((1, 8), np.int64), Silent()))


def test_another_tokenizer_is_refused(export: Export, mini: Checkpoint, tmp_path: Path) -> None:
    """The same weights beside a tokenizer with two common tokens exchanged."""
    folder = tmp_path / "model"
    shutil.copytree(mini.path, folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    vocab = value["model"]["vocab"]
    vocab["e"], vocab["a"] = vocab["a"], vocab["e"]
    (folder / "tokenizer.json").write_text(json.dumps(value))
    other = {"suites": [beginning("XfictionEN")], "max_tokens": 1024}
    with pytest.raises(ValidationError, match=r"tokenizer agrees with the reference's on \d+\.\d%"):
        run(export("Q8_0"), Checkpoint.open(folder), tmp_path, **other)
    with pytest.raises(ValidationError, match=r"tokenizer agrees with the reference's on \d+\.\d%"):
        run(folder, mini, tmp_path, runtime="torch", **other)
    assert run(mini.path, mini, tmp_path, runtime="torch", **other).suites[0].tokenizer == 1


def test_suites(tmp_path: Path) -> None:
    for name in suites.NAMES:
        suite = bundled(name)
        assert len(suite.text.encode()) >= 80_000
        assert suites.SEPARATOR not in suite.text
    own = tmp_path / "own.txt"
    own.write_text("one\n<|document|>\n\n\ntwo\n", "utf-8")
    assert suites.choose(files=[f"mine={own}"]) == [Suite("mine", "one\n\ntwo")]
    assert [suite.name for suite in suites.choose(["XwebccZH"], [f"mine={own}"])] == ["XwebccZH", "mine"]
    own.write_text(" \n<|document|>\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for names, files, words in (
        ([], [f"mine={own}"], "suite mine is empty"),
        ([], [f"mine={tmp_path / 'none'}"], "no such file"),
        ([], ["mine"], "write NAME=PATH"),
        ([], [f"l={tmp_path / 'latin.txt'}"], "not UTF-8"),
        (["Xpoetry"], [], "no such suite; there are XfictionEN"),
        (["XwebccZH"], [f"XwebccZH={own}"], "already"),
    ):
        with pytest.raises(ValidationError, match=words):
            suites.choose(names, files)


@pytest.mark.parametrize(
    ("format", "bits", "runtime", "tier"),
    [
        ("onnx", 4, "onnxruntime", "4bit"),
        ("bnb", 4, "transformers", "4bit"),
        pytest.param("onnx", 8, "onnxruntime", "8bit", marks=pytest.mark.slow),
        pytest.param("bnb", 8, "transformers", "8bit", marks=pytest.mark.slow),
    ],
)
def test_folders_in_their_runtimes(
    mini: Checkpoint, cache: Path, tmp_path: Path, format: str, bits: int, runtime: str, tier: str
) -> None:
    xent_quant.quantize(None, method="rtn", formats=[format], bits=bits, output=tmp_path, effort="fast", threads=1)
    found = run(tmp_path / format, mini, cache)
    assert (found.runtime, found.tier.name) == (runtime, tier)
    assert not found.suspicions
    assert found.cross_verdict == "within", found.cross_check
    assert all(suite.kl.verdict == "within" for suite in found.suites)
