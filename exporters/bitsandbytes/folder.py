"""What lies beside the weights: config.json, the modelling files that it names, generation defaults, tokenizer, card."""

from importlib import resources
from typing import Any

from exporters.base_model import BaseModel
from exporters.bitsandbytes.plan import BnbPlan, PlannedTensor
from exporters.card import PROMPT, opening, table, tags
from exporters.hub_files import generation_config, json_bytes, tokenizer_files
from xent_quant.checkpoint.chat_template import chat_template
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.tensors import ATTENTION_ROLES, Role
from xent_quant.units import human_bytes

INDEX = "model.safetensors.index.json"
KINDS = {
    "NF4": "4-bit NormalFloat (bitsandbytes NF4, double-quantised)",
    "FP4": "4-bit floats (bitsandbytes FP4, double-quantised)",
    "INT8": "8-bit integers (bitsandbytes LLM.int8())",
    "BF16": "bfloat16",
}


def _group(tensor: PlannedTensor) -> str:
    """What to call a tensor in the card's table."""
    part = tensor.tensor
    if part.role in (Role.GATE, Role.UP, Role.DOWN):
        return "experts" if part.expert is not None else "shared experts" if part.shared else "MLP"
    return "norms" if part.role is Role.NORM else "attention" if part.role in ATTENTION_ROLES else part.role


def files(checkpoint: Checkpoint, plan: BnbPlan, name: str) -> dict[str, bytes]:
    """File name to content. Raises CheckpointError where the tokenizer is missing, or a file is damaged."""
    package, modelling = resources.files("xent_quant") / "model", plan.architecture.family.modelling
    licences = {path.name: path.read_bytes() for path in sorted(checkpoint.path.glob("LICENSE*")) if path.is_file()}
    return {
        "config.json": json_bytes(_config(checkpoint, plan)),
        "generation_config.json": json_bytes(generation_config(checkpoint)),
        **tokenizer_files(checkpoint),
        **{file: (package / file).read_bytes() for file in (modelling.files if modelling else ())},
        **licences,
        "README.md": _readme(BaseModel.of(checkpoint.path), plan, name, chat=chat_template(checkpoint.path) is not None).encode(),
    }


def _config(checkpoint: Checkpoint, plan: BnbPlan) -> dict[str, Any]:
    quantised, family = plan.quantization_config(), plan.architecture.family
    return {
        **checkpoint.architecture.carried(checkpoint.config),
        "architectures": [family.model_class],
        **({"auto_map": family.modelling.auto_map} if family.modelling else {}),
        family.keys.width: plan.width,
        "torch_dtype": "bfloat16",
        **({"quantization_config": quantised} if quantised else {}),
        **(checkpoint.kept.to_config() if checkpoint.kept else {}),
    }


def _readme(base: BaseModel, plan: BnbPlan, name: str, *, chat: bool) -> str:
    own_code = plan.architecture.family.modelling is not None
    trust = ", trust_remote_code=True" if own_code else ""
    needed = "torch transformers accelerate" + (" bitsandbytes" if plan.bits < 16 else "")
    lines = [
        *opening(
            base,
            "transformers",
            (*(("bitsandbytes", "quantized") if plan.bits < 16 else ()), *tags(plan.architecture)),
            f"{name}-{plan.name or plan.type}",
            f"for transformers 4.57 and 5 in {KINDS[plan.type]}{', some modules in bfloat16' if plan.whole else ''}: "
            f"{human_bytes(plan.nbytes)}",
            chat=chat,
        ),
        *table((_group(tensor), tensor.type, tensor.nbytes) for tensor in plan.tensors),
        *(f"{note}\n" for note in plan.notes),
        "## Run it",
        "",
        "It runs on CUDA and, slowly, on the CPU.",
        "",
        "```",
        f"pip install {needed}",
        "```",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or its Hub id',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", dtype="auto"{trust})',
        f'inputs = tokenizer("{PROMPT}", return_tensors="pt", return_token_type_ids=False).to(model.device)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=True)[0]))",
        "```",
        "",
    ]
    if own_code:
        lines += [
            "`trust_remote_code` runs the two Python files of this folder; with `import xent_quant` first it is not needed.",
            "",
        ]
    if plan.bits < 16:
        lines += [
            "To save the loaded model again: `model.save_pretrained(folder, save_original_format=False)`; without the option "
            "transformers 5 stops at a conversion that it does not have.",
            "",
        ]
    if plan.bits == 8:
        lines += [
            "bitsandbytes logs a line at every multiplication of bfloat16, as it computes in float16; to silence it: "
            '`logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)`.',
            "",
        ]
    if plan.bits == 4:
        lines += [
            "`save_pretrained` after the model has run on a CPU writes damaged weights (bitsandbytes repacks them in place): "
            "save before, or copy this folder.",
            "",
        ]
    return "\n".join(lines)
