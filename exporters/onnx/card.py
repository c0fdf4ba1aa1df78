"""The texts beside an exported graph: the model card (Hub YAML front matter) and a script that runs it."""

from pathlib import Path

from exporters.base_model import BaseModel
from exporters.card import PROMPT, opening, table, tags
from exporters.onnx.plan import ONNXPlan
from xent_quant.checkpoint.chat_template import chat_template
from xent_quant.units import human_bytes

MINIMUM = (1, 31)
"""ONNX Runtime before it has no accuracy_level in QMoE."""

RUN = f'''"""Continues a text: python run_onnx.py "{PROMPT}"   (pip install onnxruntime-genai tokenizers)"""

import sys
from pathlib import Path

import onnxruntime
import onnxruntime_genai as og
from tokenizers import Tokenizer

if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < {MINIMUM}:
    sys.exit(f"onnxruntime {{onnxruntime.__version__}} is too old: pip install 'onnxruntime>={MINIMUM[0]}.{MINIMUM[1]}'")
folder = Path(__file__).parent
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))  # genai's own tokenizer splits some texts differently
model = og.Model(str(folder))
ids = tokenizer.encode(sys.argv[1] if len(sys.argv) > 1 else "{PROMPT}").ids
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + 200)
generator = og.Generator(model, params)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0).tolist()))
'''


def files(folder: Path, plan: ONNXPlan, name: str) -> dict[str, bytes]:
    """File name to content; `folder` is the checkpoint's."""
    readme = _readme(BaseModel.of(folder), plan, name, chat=chat_template(folder) is not None)
    return {"README.md": readme.encode(), "run_onnx.py": RUN.encode()}


def _readme(base: BaseModel, plan: ONNXPlan, name: str, *, chat: bool) -> str:
    settings, model = plan.settings, plan.architecture
    operator = f"The experts run in the operator `com.microsoft::{'QMoE' if settings.bits < 16 else 'MoE'}`. "
    lines = [
        *opening(
            base,
            "onnxruntime",
            ("onnx", "quantized", *tags(model)),
            f"{name}-{plan.name}-ONNX",
            f"for stock ONNX Runtime ({MINIMUM[0]}.{MINIMUM[1]} or newer) and onnxruntime-genai: {human_bytes(plan.data_bytes)}, "
            f"computing in {settings.onnx_dtype}",
            chat=chat,
        ),
        *table((_group(weight.name), weight.type, weight.nbytes if weight.pieces else 0) for weight in plan.weights.values()),
        *(f"{note}\n" for note in plan.notes),
        "## Run it",
        "",
        "```",
        "pip install onnxruntime-genai tokenizers",
        f'python run_onnx.py "{PROMPT}"',
        "```",
        "",
        "On an NVIDIA GPU install onnxruntime-genai-cuda instead and replace the line that loads the model:",
        "",
        "```python",
        "config = og.Config(str(folder))",
        "config.clear_providers()",
        'config.append_provider("cuda")',
        "model = og.Model(config)",
        "```",
        "",
        "Encode with the Hugging Face tokenizer, as the script does: that of onnxruntime-genai splits some texts differently. "
        "Batches are padded on the right. The key-value cache is allocated for `max_length` tokens: set it.",
        "",
        f"{operator if model.num_experts else ''}config.json says `mixtral` because optimum opens only types that it knows; the "
        f"graph is {model.family.title}'s, and `source_model_type` says so.",
        "",
    ]
    return "\n".join(lines)


def _group(name: str) -> str:
    """What to call a weight in the table: layers.3.attention.qkv is of attention, head of head."""
    parts = name.split(".")
    return "norms" if parts[-1] == "norm" else parts[2] if parts[0] == "layers" else parts[0]
