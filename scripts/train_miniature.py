#!/usr/bin/env python3
"""Trains xent-mini, the bundled miniature: a tokenizer of XVERSE's kind and a small bilingual XVERSE MoE.

    scripts/train_miniature.py --corpus CORPUS --output DIR --work WORK --minutes 30

CORPUS holds `train/*.jsonl` and `valid/*.jsonl` with the fields text and source, and SOURCES.md. The learning rate follows the
wall clock and reaches zero when the minutes are spent, so a run always ends annealed and on time. Checkpoints go to WORK;
`--resume` continues from the last; `--config` trains another shape. Router in float32, softmax over all experts, top-k,
renormalised (as released); a load-balancing loss (Switch Transformer, eq. 4) keeps every expert in use.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIALS = ["<sep>", "<pad>", "<|startoftext|>", "<|endoftext|>", "<|endofprompt|>", "<|endofknowledge|>"]
PAD, BOS, EOS = 1, 2, 3
CONFIG: dict[str, Any] = {
    "architectures": ["XverseForCausalLM"],
    "model_type": "xverse",
    "hidden_size": 256,
    "intermediate_size": 480,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 16,
    "moe_top_k": 4,
    "num_shared_experts": 2,
    "hidden_act": "silu",
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "torch_dtype": "bfloat16",
}


class Shape:
    """A config.json of model_type xverse, and its sizes by short names. Attention has as many key heads as heads."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.hidden, self.width = config["hidden_size"], config["intermediate_size"]
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.experts, self.top_k, self.shared = config["num_experts"], config["moe_top_k"], config["num_shared_experts"]
        self.vocab = config["vocab_size"]
        self.head_dim = self.hidden // self.heads
        if config.get("num_key_value_heads", self.heads) != self.heads or config["tie_word_embeddings"]:
            raise SystemExit("this script trains multi-head attention and an untied head only")


LENGTH = 256
PACKAGED = 32_000_000
"""Bytes that the package allows for the miniature."""


def documents(folder: Path) -> dict[str, list[str]]:
    """Texts of each suite of one split."""
    return {
        path.stem: [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n") if line]
        for path in sorted(folder.glob("*.jsonl"))
    }


def train_tokenizer(shape: Shape, texts: dict[str, list[str]]) -> Tokenizer:
    """BPE with byte fallback; the most frequent characters, then merges, until the vocabulary is full."""
    characters = Counter(char for suite in texts.values() for text in suite for char in text if char not in "\n\r\t")
    alphabet = [char for char, _ in characters.most_common(2650)]
    keep = set(alphabet)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace("▁", prepend_scheme="always"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab - len(SPECIALS) - len(byte_tokens),
        initial_alphabet=["▁"],
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    pieces = (
        "".join(char for char in paragraph if char in keep)
        for suite in texts.values()
        for text in suite
        for paragraph in text.split("\n")
        if paragraph
    )
    tokenizer.train_from_iterator(pieces, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    learned = sorted(trained["vocab"], key=trained["vocab"].get)
    vocab = {token: index for index, token in enumerate(SPECIALS + byte_tokens + learned)}
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    final = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    final.pre_tokenizer = tokenizer.pre_tokenizer
    final.decoder = decoders.Sequence(
        [decoders.Metaspace("▁", prepend_scheme="always"), decoders.ByteFallback(), decoders.Fuse()]
    )
    final.add_special_tokens(SPECIALS)
    if final.get_vocab_size() != shape.vocab:
        raise SystemExit(f"the tokenizer has {final.get_vocab_size()} tokens, {shape.vocab} were wanted: the corpus is too small")
    return final


def write_tokenizer(shape: Shape, tokenizer: Tokenizer, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    names = {"bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS], "pad_token": SPECIALS[PAD]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "add_bos_token": False,
        "add_eos_token": False,
        **names,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "repetition_penalty": 1.1}
    for name, value in (
        ("tokenizer_config", settings),
        ("special_tokens_map", names),
        ("generation_config", generation),
        ("config", shape.config),
    ):
        (output / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def encode_corpus(tokenizer: Tokenizer, texts: dict[str, list[str]], seed: int) -> Tensor:
    """All documents shuffled and joined by <|endoftext|>, as [n_windows, LENGTH + 1] int64 that overlap by one token."""
    flat = [text for suite in texts.values() for text in suite]
    random.Random(seed).shuffle(flat)
    ids = np.concatenate([np.array([*encoding.ids, EOS], np.int32) for encoding in tokenizer.encode_batch(flat)])
    count = (len(ids) - 1) // LENGTH
    return torch.from_numpy(np.stack([ids[i * LENGTH : i * LENGTH + LENGTH + 1] for i in range(count)])).long()


def initial_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Parameters by training name; the experts of a layer are stacked [experts, out, in]."""
    generator = torch.Generator().manual_seed(seed)
    deep = 0.02 / math.sqrt(2 * shape.layers)

    def normal(*shape: int, std: float = 0.02) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    weights = {
        "embed": normal(shape.vocab, shape.hidden),
        "norm": torch.ones(shape.hidden),
        "head": normal(shape.vocab, shape.hidden),
    }
    for layer in range(shape.layers):
        weights |= {
            f"{layer}.norm1": torch.ones(shape.hidden),
            f"{layer}.norm2": torch.ones(shape.hidden),
            f"{layer}.qkv": normal(3 * shape.hidden, shape.hidden),
            f"{layer}.o": normal(shape.hidden, shape.hidden, std=deep),
            f"{layer}.router": normal(shape.experts, shape.hidden),
            f"{layer}.gate_up": normal(shape.experts, 2 * shape.width, shape.hidden),
            f"{layer}.down": normal(shape.experts, shape.hidden, shape.width, std=deep),
            f"{layer}.shared_gate_up": normal(2 * shape.shared * shape.width, shape.hidden),
            f"{layer}.shared_down": normal(shape.hidden, shape.shared * shape.width, std=deep),
        }
    return weights


def rotary_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] in rotate_half layout."""
    frequency = shape.config["rope_theta"] ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angle = torch.arange(length)[:, None] * frequency
    return torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def forward(shape: Shape, weights: dict[str, Tensor], ids: Tensor, loads: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """[batch, length] token ids to logits [batch * length, vocab] and the routers' auxiliary loss."""
    batch, length = ids.shape
    cos, sin = rotary_tables(shape, length)
    auxiliary = torch.zeros(())
    x = F.embedding(ids, weights["embed"])

    def norm(value: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(value, (shape.hidden,), weight, shape.config["rms_norm_eps"])

    def rotate(value: Tensor) -> Tensor:
        first, second = value.chunk(2, -1)
        return value * cos.to(value.dtype) + torch.cat([-second, first], -1) * sin.to(value.dtype)

    for layer in range(shape.layers):
        qkv = F.linear(norm(x, weights[f"{layer}.norm1"]), weights[f"{layer}.qkv"])
        q, k, v = (part.view(batch, length, shape.heads, shape.head_dim).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, shape.hidden), weights[f"{layer}.o"])
        h = norm(x, weights[f"{layer}.norm2"]).reshape(-1, shape.hidden)
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(h.float(), weights[f"{layer}.router"])
            probabilities = scores.softmax(-1)
            chosen, index = probabilities.topk(shape.top_k, -1)
            chosen = chosen / chosen.sum(-1, keepdim=True)
        load = torch.bincount(index.reshape(-1), minlength=shape.experts)
        if loads is not None:
            loads.append(load)
        share = load / load.sum()
        auxiliary = (
            auxiliary + 0.01 * shape.experts * (share * probabilities.mean(0)).sum() + 1e-4 * scores.logsumexp(-1).square().mean()
        )
        order = index.reshape(-1).argsort(stable=True)
        token = order // shape.top_k
        rows = h[token].split(load.tolist())
        outs = [swiglu(row, weights[f"{layer}.gate_up"][e], weights[f"{layer}.down"][e]) for e, row in enumerate(rows)]
        routed = torch.cat(outs).float() * chosen.reshape(-1)[order, None]
        y = torch.zeros(len(h), shape.hidden).index_add(0, token, routed)
        y = y + swiglu(h, weights[f"{layer}.shared_gate_up"], weights[f"{layer}.shared_down"])
        x = x + y.view(batch, length, shape.hidden)
    return F.linear(norm(x, weights["norm"]), weights["head"]).reshape(-1, shape.vocab), auxiliary


def export(shape: Shape, weights: dict[str, Tensor], output: Path, largest: int) -> None:
    """Write the parameters under the names of a released checkpoint, bfloat16, in one safetensors file below `largest` bytes."""
    tensors = {
        "model.embed_tokens.weight": weights["embed"],
        "model.norm.weight": weights["norm"],
        "lm_head.weight": weights["head"],
    }
    for layer in range(shape.layers):
        base, take = f"model.layers.{layer}.", lambda name, layer=layer: weights[f"{layer}.{name}"]
        tensors[base + "input_layernorm.weight"] = take("norm1")
        tensors[base + "post_attention_layernorm.weight"] = take("norm2")
        for name, part in zip("qkv", take("qkv").chunk(3), strict=True):
            tensors[f"{base}self_attn.{name}_proj.weight"] = part
        tensors[base + "self_attn.o_proj.weight"] = take("o")
        tensors[base + "mlp.router.weight"] = take("router")
        blocks = [(f"experts.{e}", take("gate_up")[e], take("down")[e]) for e in range(shape.experts)]
        for name, gate_up, down in [*blocks, ("shared_experts", take("shared_gate_up"), take("shared_down"))]:
            gate, up = gate_up.chunk(2)
            for projection, value in (("gate", gate), ("up", up), ("down", down)):
                tensors[f"{base}mlp.{name}.{projection}_proj.weight"] = value
    path = output / "model.safetensors"
    part = path.with_suffix(".part")
    save_file(
        {name: value.detach().bfloat16().clone().contiguous() for name, value in tensors.items()}, part, metadata={"format": "pt"}
    )
    if part.stat().st_size >= largest:
        raise SystemExit(f"{part} is {part.stat().st_size} bytes, less than {largest} are wanted")
    part.replace(path)


def validate(
    shape: Shape, weights: dict[str, Tensor], tokenizer: Tokenizer, texts: dict[str, list[str]], limit: int
) -> dict[str, float]:
    """Perplexity of each suite in float32 on the bf16-rounded weights: windows of 512, second half scored."""
    rounded = {name: value.detach().bfloat16().float() for name, value in weights.items()}
    result = {}
    for suite, docs in texts.items():
        ids = torch.tensor([i for text in docs for i in [*tokenizer.encode(text).ids, EOS]])
        windows = ids[: len(ids) // 512 * 512].view(-1, 512)[: max(1, limit // 256)]
        total = 0.0
        with torch.no_grad():
            for batch in windows.split(4):
                logits = forward(shape, rounded, batch)[0].view(*batch.shape, shape.vocab)[:, 255:-1]
                total += F.cross_entropy(logits.reshape(-1, shape.vocab), batch[:, 256:].reshape(-1), reduction="sum").item()
        result[suite] = math.exp(total / (len(windows) * 256))
    return result


def write_card(shape: Shape, output: Path, corpus: Path, result: dict[str, Any]) -> None:
    """The model card, from what this run measured, and the table of the works it was trained on."""
    figures = result["perplexity"]
    lines = [
        "---",
        "license: apache-2.0",
        "language: [en, zh]",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [xverse, mixture-of-experts, miniature]",
        "---",
        "",
        "# xent-mini",
        "",
        f"A really trained XVERSE mixture of experts of {result['parameters'] / 1e6:.1f} M parameters: {shape.layers} layers,",
        f"hidden size {shape.hidden}, {shape.experts} routed experts of width {shape.width} with top-{shape.top_k} routing,",
        f"{shape.shared} shared experts,",
        f"{shape.vocab} tokens. It exists so that",
        "quantisation and export can be tried and measured without a download; it writes plausible",
        "nonsense in English and Chinese.",
        "A base model: raw completion, no chat template.",
        "",
        f"Trained for {result['steps']:,} steps on {result['tokens'] / 1e6:.1f} M tokens ({result['minutes']:g} minutes of",
        "CPU) by `scripts/train_miniature.py`. Works, authors and licences: SOURCES.md",
        "(public domain, CC0, CC-BY-4.0, Apache-2.0, BSD-3-Clause).",
        "The weights are licensed Apache-2.0.",
        "",
        "Perplexity per token on works not trained on, float32 forward on these bf16 weights,",
        "windows of 512, second half scored:",
        "",
        "| suite | perplexity |",
        "|---|---|",
        *(f"| {suite} | {value:.2f} |" for suite, value in figures.items()),
        "",
    ]
    (output / "README.md").write_text("\n".join(lines), "utf-8")
    table = [line for line in (corpus / "SOURCES.md").read_text("utf-8").splitlines() if line.startswith("|")]
    works = [line for line in table[2:] if line.split("|")[2].strip() == "train"]
    intro = [
        "# Works that xent-mini was trained on",
        "",
        "Changes made to all of them: markup and code blocks removed, text cut into documents.",
        "",
    ]
    (output / "SOURCES.md").write_text("\n".join([*intro, *table[:2], *works, ""]), "utf-8")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(".work/mini"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=32, help="windows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--config", type=Path, help="config.json of another shape; keys that it lacks are the miniature's")
    options = parser.parse_args()
    config = json.loads(options.config.read_text("utf-8")) if options.config else {}
    shape = Shape({**CONFIG, **config})
    largest = sys.maxsize if options.config else PACKAGED

    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)
    texts = documents(options.corpus / "train")
    tokenizer_file = options.work / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(shape, texts)
        tokenizer.save(str(tokenizer_file))
    write_tokenizer(shape, tokenizer, options.output)
    windows = encode_corpus(tokenizer, texts, options.seed)
    weights = initial_weights(shape, options.seed)
    matrices = [value.requires_grad_() for value in weights.values() if value.ndim > 1]
    vectors = [value.requires_grad_() for value in weights.values() if value.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=True)
    step, spent = 0, 0.0
    checkpoint = options.work / "checkpoint.pt"
    if options.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, value in weights.items():
            value.data.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    else:
        export(shape, weights, options.output, largest)

    print(f"{len(windows):,} windows of {LENGTH} tokens, {sum(v.numel() for v in weights.values()):,} parameters", flush=True)
    budget, begun = options.minutes * 60, time.monotonic() - spent
    saved = logged = time.monotonic()
    per_epoch = len(windows) // options.batch
    smooth = math.log(shape.vocab)
    while (elapsed := time.monotonic() - begun) < budget:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(options.seed + epoch))
        batch = windows[order[position * options.batch : (position + 1) * options.batch]]
        done = elapsed / budget
        rate = options.rate * min(1.0, (step + 1) / 100, (1 - done) / 0.6)  # warm up, hold, then fall to zero
        for group in optimizer.param_groups:
            group["lr"] = rate
        loads: list[Tensor] = []
        with torch.autocast("cpu", torch.bfloat16):
            logits, auxiliary = forward(shape, weights, batch[:, :-1], loads)
            loss = F.cross_entropy(logits.float(), batch[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        (loss + auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(matrices + vectors, 1.0)
        optimizer.step()
        step += 1
        smooth += 0.05 * (loss.item() - smooth)
        if step % 20 == 0:
            spread = ", ".join(f"{int(load.min())}-{int(load.max())}" for load in loads)
            now = time.monotonic()
            speed, logged = 20 * options.batch * LENGTH / (now - logged), now
            print(
                f"step {step} loss {smooth:.3f} rate {rate:.5f} {100 * done:.1f}% {speed:.0f} tokens/s loads {spread}", flush=True
            )
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            state = {"weights": weights, "optimizer": optimizer.state_dict(), "step": step, "spent": saved - begun}
            save_checkpoint(checkpoint, state)
            export(shape, weights, options.output, largest)
    export(shape, weights, options.output, largest)
    state = {"weights": weights, "optimizer": optimizer.state_dict(), "step": step, "spent": time.monotonic() - begun}
    save_checkpoint(checkpoint, state)
    figures = validate(shape, weights, tokenizer, documents(options.corpus / "valid"), 8192)
    result = {
        "parameters": sum(value.numel() for value in weights.values()),
        "steps": step,
        "tokens": step * options.batch * LENGTH,
        "minutes": options.minutes,
        "perplexity": figures,
    }
    write_card(shape, options.output, options.corpus, result)
    (options.work / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
