#!/usr/bin/env python3
"""A deep mixture of experts to judge by, made from a dense model in minutes and without training by gradients.

    scripts/make_deep_moe.py DENSE TEXT.txt --output DIR [--tokens 32k] [--judge TEXT.txt]

DENSE is a checkpoint such as `scripts/make_smollm.py` writes. Layer by layer the neurons of its MLP that are most active on the
text become shared experts, the others are clustered by when they are active into routed ones of equal size. The router is the
ridge regression of the logarithms of the experts' output norms. Down projections are then the ridge regression, around their own
weights, of what the dense model's residual stream has behind the layer, on what the mixture has in front of it: what earlier
layers lost is made up as far as rows allow. Prints both perplexities on the text that is judged (by default the end of the other
one), and how evenly tokens are routed. Holds the states of the text twice, and a layer.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from xent_quant.checkpoint.architecture import Layer
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.linalg import linear
from xent_quant.model.layers import attention, rms_norm, rotary_tables, route, swiglu
from xent_quant.options import CalibrationOptions

WIDTH, EXPERTS, SHARED, TOP_K = 128, 9, 3, 6
LENGTH = 512
PART = 8
"""Windows that go through attention together."""
ROUNDS = 8
"""Of clustering."""
SPREAD = 0.35
"""Standard deviation of router logits: gates stay near 1 / TOP_K, as the neurons' sum has it."""
ROUTER_DAMPING, DOWN_DAMPING = 0.05, 0.01
"""Of the mean energy of a column."""


@dataclass
class Streams:
    """Residual streams [tokens, hidden] of the same windows, of the dense model and of the mixture; the last `judged` tokens are
    kept from all fits."""

    dense: Tensor
    mixture: Tensor
    judged: int


class Mixer:
    """Turns one layer after another into routed and shared experts."""

    def __init__(self, checkpoint: Checkpoint, windows: Tensor, judged: int, seed: int) -> None:
        self.checkpoint, self.windows, self.model = checkpoint, windows, checkpoint.architecture
        rows = checkpoint.read_torch(self.model.embedding.name)[windows.reshape(-1)]
        self.streams = Streams(rows, rows.clone(), judged)
        self.weights: dict[str, Tensor] = {}
        self.shares: list[Tensor] = []
        self._tables = rotary_tables(LENGTH, self.model, torch.float32)
        self._random = torch.Generator().manual_seed(seed)

    def layer(self, index: int) -> None:
        """Of the streams in front of a layer those behind it, and the layer's weights."""
        layer, eps = self.model.layer(index), self.model.rms_norm_eps
        assert layer.mlp is not None
        for stream in (self.streams.dense, self.streams.mixture):
            self._attend(layer, stream)
        norm = self.checkpoint.read_torch(layer.mlp_norm.name)
        gate, up, down = (self.checkpoint.read_torch(spec.name) for spec in layer.mlp)
        exact, own = rms_norm(self.streams.dense, norm, eps), rms_norm(self.streams.mixture, norm, eps)
        inner = swiglu(exact, gate, up)
        self.streams.dense += linear(inner, down)
        fitted = slice(0, len(own) - self.streams.judged)
        shared, routed = self._split(inner[fitted], down)
        router = self._router(own[fitted], inner[fitted], down, routed)
        gates, chosen = route(linear(own, router), TOP_K, renormalise=True)
        weight = torch.zeros(len(own), EXPERTS).scatter_(1, chosen, gates)
        self.shares.append((weight > 0).float().mean(0) / TOP_K)
        order = torch.cat([shared, *routed])
        features = swiglu(own, gate[order], up[order])
        features[:, len(shared) :] *= weight.repeat_interleave(WIDTH, 1)
        start = down[:, order].clone()
        start[:, len(shared) :] *= TOP_K
        wanted = self.streams.dense - self.streams.mixture
        made = _ridge(features[fitted], wanted[fitted] - linear(features[fitted], start), DOWN_DAMPING).T + start
        self.streams.mixture += linear(features, made)
        prefix = f"model.layers.{index}.mlp."
        self.weights[f"{prefix}router.weight"] = router
        count = len(shared)
        parts = [("shared_experts", slice(0, count))]
        parts += [(f"experts.{e}", slice(count + e * WIDTH, count + (e + 1) * WIDTH)) for e in range(EXPERTS)]
        for name, columns in parts:
            rows = order[columns]
            for which, value in (("gate", gate[rows]), ("up", up[rows]), ("down", made[:, columns])):
                self.weights[f"{prefix}{name}.{which}_proj.weight"] = value

    def _attend(self, layer: Layer, stream: Tensor) -> None:
        norm, *projections = (
            self.checkpoint.read_torch(spec.name) for spec in (layer.attention_norm, layer.q, layer.k, layer.v, layer.output)
        )
        for rows in torch.split(stream, PART * LENGTH):
            h = rms_norm(rows, norm, self.model.rms_norm_eps)
            q, k, v = (linear(h, weight).view(-1, LENGTH, len(weight)) for weight in projections[:3])
            rows += linear(attention(q, k, v, self.model.head_dim, self._tables).flatten(0, 1), projections[3])

    def _split(self, inner: Tensor, down: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Neurons of the shared experts, and of each routed one, by `inner` rows [n, neurons]."""
        energy = inner.abs() * down.norm(dim=0)
        order = energy.mean(0).argsort(descending=True)
        shared, rest = order[: SHARED * WIDTH], order[SHARED * WIDTH :]
        patterns = F.normalize(energy[:: max(1, len(energy) // 2048), rest].T, dim=1)
        centres = patterns[torch.randperm(len(rest), generator=self._random)[:EXPERTS]]
        for _ in range(ROUNDS):
            likeness = patterns @ centres.T
            free, of = [WIDTH] * EXPERTS, torch.empty(len(rest), dtype=torch.long)
            for neuron in likeness.max(1).values.argsort(descending=True).tolist():
                best = next(e for e in likeness[neuron].argsort(descending=True).tolist() if free[e])
                of[neuron] = best
                free[best] -= 1
            centres = torch.stack([F.normalize(patterns[of == e].mean(0), dim=0) for e in range(EXPERTS)])
        return shared, [rest[of == e] for e in range(EXPERTS)]

    @staticmethod
    def _router(rows: Tensor, inner: Tensor, down: Tensor, routed: list[Tensor]) -> Tensor:
        norms = torch.stack([linear(inner[:, each], down[:, each].contiguous()).norm(dim=1) for each in routed], 1)
        wanted = (norms / norms.mean(0)).clamp_min(1e-6).log()
        router = _ridge(rows, wanted - wanted.mean(1, keepdim=True), ROUTER_DAMPING).T.contiguous()
        return router * (SPREAD / linear(rows, router).std())


def _ridge(rows: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """[columns, outputs] that take rows [n, columns] nearest to what is wanted [n, outputs]."""
    gram = rows.T @ rows
    gram.diagonal().add_(damping * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, rows.T @ wanted)


def perplexity(checkpoint: Checkpoint, states: Tensor, ids: Tensor) -> float:
    """Of the next tokens, by final states of whole windows."""
    model = checkpoint.architecture
    h = rms_norm(states, checkpoint.read_torch(model.final_norm.name), model.rms_norm_eps)
    head, lost, count = checkpoint.read_torch(model.head.name), 0.0, 0
    for rows, tokens in zip(torch.split(h, LENGTH), torch.split(ids, LENGTH), strict=True):
        lost += float(F.cross_entropy(linear(rows[:-1], head), tokens[1:], reduction="sum"))
        count += len(tokens) - 1
    return float(torch.tensor(lost / count).exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", default="32k")
    parser.add_argument("--judge", type=Path, help="text; default: an eighth of the tokens of the other one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output}: exists")
    checkpoint = Checkpoint.open(options.dense)
    tokenizer = Tokenizer.from_file(str(options.dense / "tokenizer.json"))
    count = CalibrationOptions(tokens=options.tokens).n_tokens // LENGTH
    judged = max(1, count // 8)

    def encoded(text: Path, most: int) -> Tensor:
        ids = torch.tensor(tokenizer.encode(text.read_text("utf-8")[: 12 * most * LENGTH]).ids)
        return ids[: min(most, len(ids) // LENGTH) * LENGTH].view(-1, LENGTH)

    windows = encoded(options.text, count if options.judge else count + judged)
    if options.judge:
        last = encoded(options.judge, judged)
        judged, windows = len(last), torch.cat([windows, last])
    mixer = Mixer(checkpoint, windows, judged * LENGTH, options.seed)
    for index in range(checkpoint.architecture.num_layers):
        mixer.layer(index)
        print(f"layer {index + 1} of {checkpoint.architecture.num_layers}", flush=True)
    ids = windows[-judged:].reshape(-1)
    found = [perplexity(checkpoint, stream[-len(ids) :], ids) for stream in (mixer.streams.dense, mixer.streams.mixture)]
    shares = torch.stack(mixer.shares) * EXPERTS
    print(f"perplexity {found[0]:.2f} of the dense model, {found[1]:.2f} of the mixture, {len(ids)} tokens")
    print(f"an expert's tokens over an even share: least {shares.min():.2f}, most {shares.max():.2f}")

    shutil.copytree(options.dense, options.output)
    names = {
        spec.name
        for layer in range(checkpoint.architecture.num_layers)
        for spec in checkpoint.architecture.layer(layer).mlp or ()
    }
    kept = {name: checkpoint.read_torch(name) for name in checkpoint.infos if name not in names}
    every = {name: value.bfloat16().contiguous().clone() for name, value in {**kept, **mixer.weights}.items()}
    save_file(every, options.output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((options.dense / "config.json").read_text("utf-8"))
    config |= {"architectures": ["XverseForCausalLM"], "model_type": "xverse", "intermediate_size": WIDTH, "num_experts": EXPERTS}
    config |= {"moe_top_k": TOP_K, "num_shared_experts": SHARED}
    (options.output / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    print(Checkpoint.open(options.output).path)


if __name__ == "__main__":
    main()
