"""What a run takes: memory, disk, and time on this machine, said before anything is read.

Memory is counted from what the parts say that they hold, in the stage that needs most, with a margin; time is arithmetic
divided by what this machine does in a few seconds' measurement.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from exporters.interface import Exporter
from xent_quant.checkpoint.architecture import Architecture
from xent_quant.checkpoint.reader import Checkpoint
from xent_quant.errors import ConfigError
from xent_quant.formats._lanes import WIDTH
from xent_quant.formats.base import F32
from xent_quant.model.sizes import (
    ADDED_ROWS,
    DEVICE_PART_TOKENS,
    HELD_OUT_ROWS,
    KEPT_ROWS,
    PART_TOKENS,
    PIECE,
    SLICES,
    Room,
    state_files,
)
from xent_quant.progress import Progress
from xent_quant.tensors import ATTENTION_ROLES, InputStatistics, Role, TensorSpec
from xent_quant.units import human_bytes

if TYPE_CHECKING:
    import torch

MIB = 2**20
PROGRAM = 280 * MIB
"""Python, numpy, numba with its kernels, and the allocator's slack."""
TORCH = 330 * MIB
"""torch, its libraries and their threads."""
EXPERTS_TOGETHER = 8
"""Of a layer that a device works on at a time, at most."""
TOGETHER_ON_DEVICE = (ATTENTION_ROLES - {Role.ATTENTION_OUTPUT}, {Role.ATTENTION_OUTPUT}, {Role.GATE, Role.UP}, {Role.DOWN})
VOCABULARY = 700
"""Bytes that tokenizer, its check and the header of a file take for each token, about."""
MARGIN = 1.1
WORTH_SAYING = 256 * MIB
"""Of disk that the work takes for a while."""
PROBE_ROWS, PROBE_COLUMNS = 192, 1024
"""Of the weight that the time of rounding is measured on."""


@dataclass(frozen=True)
class Resources:
    """`memory` is the peak of resident bytes, `disk` what the work takes beside the results until it is done, `result` the
    bytes of these; `seconds` of the clock, None where nothing was measured. `tokens` run through the model. `vram` is the peak of
    bytes on each of the `devices` that methods compute on, None where there is none."""

    memory: int
    disk: int
    result: int
    tokens: int
    seconds: float | None
    vram: int | None = None
    devices: int = 0

    def to_json(self) -> dict[str, Any]:
        return vars(self).copy()


def memory(model: Architecture, followers: int, length: int, room: Room) -> int:
    """Peak of resident bytes of a walk with so many quantised streams over windows of `length` tokens; 0: without text."""
    tensors = list(model.tensors().values())
    rows_of_vocabulary = PROGRAM + VOCABULARY * model.vocab_size
    if not length:
        # Stored bytes, float32, padded rows and packed ones: of each thread's piece, or of a tensor that is read whole.
        piece = max(PIECE, WIDTH * max(t.shape[-1] for t in tensors))
        whole = min(Checkpoint.SLICE, max(t.n_weights for t in tensors))
        return int(MARGIN * (rows_of_vocabulary + 12 * max(whole, numba.get_num_threads() * piece)))
    in_layer = [tensor for tensor in tensors if tensor.layer is not None and len(tensor.shape) > 1]
    routed = [tensor for tensor in in_layer if tensor.expert is not None]
    streams = 1 + followers
    threads = numba.get_num_threads()
    side_by_side = room.experts or threads
    unrouted = [tensor for tensor in in_layer if tensor.expert is None]
    for_all = _stage(unrouted, model, streams, max(PART_TOKENS, length), min(followers, room.streams or threads))
    experts = layer = 0
    if routed:
        inner = 4 * room.kept_rows * model.intermediate_size * streams
        shared = 2 * 4 * model.shared_size * model.hidden_size * streams
        # Σxxᵀ, drift and regression of all tokens, and those of them that are held out.
        layer = followers * 4 * (3 * model.hidden_size**2 + 2 * HELD_OUT_ROWS * model.hidden_size)
        experts = shared + layer + side_by_side * (inner + _stage(routed, model, streams, PART_TOKENS))
    slices = min(SLICES, side_by_side) * _slice(model)
    made = _made(model, model.hidden_size, slices) if followers else 4 * 2 * slices
    head = layer + _rows(model, model.hidden_size, PART_TOKENS) + made
    return int(MARGIN * (rows_of_vocabulary + TORCH + max(for_all, experts, head)))


def _stage(tensors: Sequence[TensorSpec], model: Architecture, streams: int, part: int, measured: int = 1) -> int:
    """Bytes that the largest stage of these tensors holds: weights, `part` rows on their way, and what is made of the rows, of so
    many streams that are `measured` at a time."""
    columns, largest = max(tensor.shape[-1] for tensor in tensors), max(tensor.n_weights for tensor in tensors)
    weights = 4 * largest * (3 * streams + 1)  # the most that read the same, or gate, up and down; one as stored
    made = _made(model, columns, largest) if streams > 1 else 2 * 3 * largest  # in bfloat16
    rows = _rows(model, columns, part)
    threads: int = numba.get_num_threads()
    return weights + max(max(1, measured) * (rows + made), min(streams, threads) * rows)


def _rows(model: Architecture, columns: int, part: int) -> int:
    """Bytes of `part` rows on their way through a weight of so many columns."""
    return 4 * part * (4 * model.hidden_size + 3 * columns)


def _made(model: Architecture, columns: int, weights: int) -> int:
    """Bytes of what GPTQ makes of the rows in front of a weight of so many columns, and of so many of its weights."""
    # Rows that wait to be added, and their turned ones. Sums: Σxxᵀ, drift, residuals. Ready: Hessian, drift, damped, root, what
    # is made of it to solve and to round, and two on the way. Weight, pull, errors, what is solved of the pull, and the bytes.
    waiting = 4 * ADDED_ROWS * (4 * columns + model.hidden_size)
    sums = 4 * (2 * columns**2 + columns * model.hidden_size) + 4 * 8 * columns**2
    return waiting + sums + 4 * 5 * weights + 4 * HELD_OUT_ROWS * (2 * columns + model.hidden_size)


def room(model: Architecture, followers: int, length: int, limit: int | None) -> Room:
    """What to hold so that `limit` bytes are not passed. Raises ConfigError where the least would not do."""
    most = numba.get_num_threads() if length else 1
    for chosen in _rooms(most, max(1, min(followers, most))):
        if limit is None or memory(model, followers, length, chosen) <= limit:
            return chosen
    raise _too_little(limit or 0, memory(model, followers, length, Room(0, 1, 1)), followers, bool(length))


def _rooms(experts: int, streams: int = 1) -> Iterator[Room]:
    """From so many experts side by side, and streams, to the least. Experts take most of the time."""
    for number in range(experts, 0, -1):
        for rows in (KEPT_ROWS, KEPT_ROWS // 2, KEPT_ROWS // 4, 0):
            yield from (Room(rows, number, together) for together in range(streams, 0, -1))


def _too_little(limit: int, least: int, followers: int, text: bool) -> ConfigError:
    remedy = "use --method imatrix, or one format at a time" if followers else "use --method rtn" if text else "give it more"
    return ConfigError(f"--memory {human_bytes(limit)}: about {human_bytes(least)} are needed; {remedy}")


def _stages(model: Architecture) -> Iterator[tuple[int, int, bool]]:
    """Of what reads the same rows in a layer, which is one weight to a device: weights, columns, whether it is a routed
    expert's."""
    one = replace(model, num_layers=1).tensors().values()
    for roles in TOGETHER_ON_DEVICE:
        for expert in (None, 0):
            same = [t for t in one if t.layer is not None and t.role in roles and t.expert == expert]
            if same:
                yield sum(tensor.n_weights for tensor in same), max(tensor.shape[-1] for tensor in same), expert is not None


def _slice(model: Architecture) -> int:
    """Weights of the embedding or the head that are worked on at a time."""
    return min(Checkpoint.SLICE, model.embedding.n_weights)


def vram(model: Architecture, followers: int, length: int, room: Room) -> int:
    """Peak of a device's bytes of a walk with so many quantised streams over windows of `length` tokens, when methods compute
    there on `room.experts` experts together."""
    from xent_quant.device.rounding import COPIES, HESSIANS
    from xent_quant.device.search import HELD, MAX_LANES

    streams, together, hidden = 1 + followers, room.experts or 1, model.hidden_size

    def stage(weights: int, columns: int, number: int = 1) -> int:
        rows = 4 * DEVICE_PART_TOKENS * (4 * hidden + 3 * columns) + 4 * ADDED_ROWS * (4 * columns + hidden) * bool(followers)
        return rows + 4 * number * (weights * (streams + COPIES) + HESSIANS * columns**2 * bool(followers))

    every = list(_stages(model))
    for_all = max(stage(weights, columns) for weights, columns, routed in every if not routed)
    scores = 2 * 4 * DEVICE_PART_TOKENS * length * model.num_heads
    experts = 0
    if model.num_experts:
        inner = 4 * room.kept_rows * model.intermediate_size * streams * together
        shared = 2 * 4 * model.shared_size * hidden * streams
        layer = followers * 2 * 4 * (hidden**2 + HELD_OUT_ROWS * hidden)  # to make up rare experts, with drift
        experts = inner + shared + layer + max(stage(weights, columns, together) for weights, columns, routed in every if routed)
    return int(MARGIN * (4 * HELD * MAX_LANES + max(for_all + scores, experts, stage(_slice(model), hidden))))


def beside_device(model: Architecture, followers: int, length: int, room: Room, device: "torch.device", devices: int = 1) -> int:
    """Peak of resident bytes of such a walk, without what the driver takes, where so many `devices` share experts. Where the
    device is the CPU, those of the devices are among them."""
    columns, number = max(model.hidden_size, model.intermediate_size, model.shared_size), (room.experts or 1) * devices
    # float32 of two stages, one of them being read, and in pinned memory; codes and bytes.
    weights = 14 * max(_slice(model), *(each * (number if routed else 1) for each, _, routed in _stages(model)))
    rows = 2 * 4 * DEVICE_PART_TOKENS * columns * devices
    there = devices * vram(model, followers, length, room) if device.type == "cpu" else 0
    return there + int(MARGIN * (PROGRAM + VOCABULARY * model.vocab_size + TORCH + weights + rows))


def device_room(
    model: Architecture,
    followers: int,
    length: int,
    device: "torch.device",
    limit: int | None,
    *,
    memory: int | None = None,
    before: Room | None = None,
) -> Room:
    """What to hold on a device so that `limit` bytes of its memory are not passed, or what is free there, nor `memory` bytes
    beside it: what an earlier run held (`before`), else the most. Raises ConfigError where the least would not do, or less is
    free than the limit."""
    from xent_quant.device.choice import free_bytes

    free = free_bytes(device)
    if limit is not None and free is not None and limit > free:
        raise ConfigError(f"--vram {human_bytes(limit)}: only {human_bytes(free)} are free on {device}; give it less")
    most = limit if limit is not None else free
    for chosen in (*([before] if before else []), *_rooms(EXPERTS_TOGETHER)):
        if most is not None and vram(model, followers, length, chosen) > most:
            continue
        if memory is None or beside_device(model, followers, length, chosen, device) <= memory:
            return chosen
    least = vram(model, followers, length, Room(0, 1, 1))
    if memory is not None and (most is None or least <= most):
        raise _too_little(memory, beside_device(model, followers, length, Room(0, 1, 1), device), followers, True)
    said = f"--vram {human_bytes(limit)}" if limit is not None else f"--device {device}: {human_bytes(free or 0)} are free"
    raise ConfigError(f"{said}: about {human_bytes(least)} are needed; use --device cpu, or one format at a time")


def helping(
    model: Architecture,
    followers: int,
    length: int,
    room: Room,
    devices: "Sequence[torch.device]",
    report: Progress,
    *,
    memory: int | None = None,
    stacks: bool = True,
) -> "tuple[torch.device, ...]":
    """Of `devices` behind the first those that share its experts, in stacks or, unless `stacks`, one by one: on which as much
    memory is free as is planned on the first, and beside which `memory` bytes of RAM suffice. How many experts are one stack, and
    so what is written, depends on none."""
    from xent_quant.device.choice import free_bytes

    first, *others = devices
    found: list[torch.device] = []
    parts = -(-(model.num_experts or 0) // ((room.experts or 1) if stacks else 1))
    needed = vram(model, followers, length, room)
    for device in others:
        if len(found) + 1 >= parts:
            report.note(f"{device} takes no part: there are no more stacks of a layer's experts than devices before it.")
            continue
        beside = beside_device(model, followers, length, room, first, len(found) + 2)
        try:
            free = free_bytes(device)
        except RuntimeError as error:  # what asks takes some of its memory, or it is another program's alone
            report.note(f"{device} takes no part: {str(error).splitlines()[0]}")
            continue
        if free is not None and free < needed:
            report.note(f"{device} takes no part: {human_bytes(needed)} of its memory are needed, {human_bytes(free)} are free.")
        elif memory is not None and memory < beside:
            report.note(f"{device} takes no part: about {human_bytes(beside)} of RAM are needed, --memory is less.")
        else:
            found.append(device)
    if found:
        report.note(f"{', '.join(map(str, [first, *found]))} share each layer's experts.")
    return tuple(found)


def disk(model: Architecture, tokens: int, followers: int, device: "torch.device | None", *, measured: bool = True) -> int:
    """Bytes of the states while a text runs, on a device or not; `measured`: for statistics of all weights."""
    columns = state_files(model, inner=measured and (device is None or device.type == "cpu"))
    return 4 * sum(columns.values()) * tokens * (1 + followers)


def seconds(
    model: Architecture,
    exporters: Sequence[Exporter],
    tokens: int,
    hessian: Sequence[bool],
    products: "torch.dtype | None" = None,
) -> float:
    """Of the whole walk on this machine, from the speed of its matrix products (by weights of the type `products`, or float32),
    factorisations and of each lane's rounding; takes a few seconds itself."""
    tensors = [tensor for tensor in model.tensors().values() if len(tensor.shape) > 1]
    total = 0.0
    for exporter, needed in zip(exporters, hessian, strict=True):
        for kind, weights in _by_encoding(exporter, tensors).items():
            total += weights * _rounding(exporter, kind, needed and tokens > 0)
    if not tokens:
        return total
    product, factorisation = _speeds(products)
    followers = sum(hessian)
    for routed in (False, True):
        flops, cubes = arithmetic(model, tokens, followers, routed=routed)
        total += flops / product + cubes / factorisation / numba.get_num_threads()
    return total


def arithmetic(model: Architecture, tokens: int, followers: int, *, routed: bool) -> tuple[float, float]:
    """Of a walk with so many quantised streams, for routed experts or for all other weights: floating-point operations of
    products, and n³ of factorisations [n, n]. Rounding is apart."""
    layer = [t for t in model.tensors().values() if t.layer is not None and len(t.shape) > 1]
    some = [tensor for tensor in layer if (tensor.expert is not None) == routed]
    rows = tokens * (model.experts_per_token / model.num_experts if routed and model.num_experts else 1.0)
    flops = sum(2 * rows * tensor.n_weights for tensor in some) * (1 + followers) * 1.15
    # Gate shares its rows with up, q with k and v: statistics are made once for them.
    alone = [t for t in some if t.role in (Role.ATTENTION_Q, Role.ATTENTION_OUTPUT, Role.GATE, Role.DOWN)]
    # Half of a product, it being symmetric, and one for the drift, which routed experts' gate and up take from their layer.
    sums = {t.name: 0.5 if routed and t.role is Role.GATE else 1.5 for t in alone}
    flops += followers * sum(2 * rows * t.shape[-1] ** 2 * sums[t.name] for t in alone)
    flops += followers * sum(2 * t.n_weights * t.shape[-1] * 1.5 for t in some if t.role is not Role.ROUTER)
    return flops, followers * sum(t.shape[-1] ** 3 for t in alone)


def _by_encoding(exporter: Exporter, tensors: Sequence[TensorSpec]) -> dict[Any, int]:
    found: dict[Any, int] = {}
    slots = exporter.slots  # made anew each time that it is asked for
    for tensor in tensors:
        for slot in slots[tensor.name]:
            found[slot.encoding] = found.get(slot.encoding, 0) + slot.rows * slot.columns
    return found


def _rounding(exporter: Exporter, encoding: Any, hessian: bool) -> float:
    """Seconds a weight."""
    from xent_quant.methods.rtn import RoundToNearest

    random = np.random.default_rng(0)
    weights = random.standard_normal((PROBE_ROWS, PROBE_COLUMNS), np.float32)
    known = None
    if hessian:
        rows = random.standard_normal((2 * PROBE_COLUMNS, PROBE_COLUMNS), np.float32)
        hessian_of: F32 = (rows.T @ rows / np.float32(len(rows))).astype(np.float32)
        known = InputStatistics(np.square(rows).mean(0), hessian_of, len(rows), rows[:64])
    method = exporter.method or RoundToNearest()
    for _ in range(2):  # the first time kernels are compiled, or loaded, and the Hessian factorised, which is counted apart
        begun = time.perf_counter()
        method.quantize(weights, encoding, known, name="probe")
    seconds = (time.perf_counter() - begun) / weights.size
    return seconds / numba.get_num_threads() if hessian else seconds  # a Hessian's rows are rounded in one job here


def _speeds(products: "torch.dtype | None") -> tuple[float, float]:
    """Floating-point operations a second of a product of float32 rows, and n³ a second of a factorisation [n, n]."""
    import torch

    from xent_quant.linalg import linear, root

    a = torch.randn(1024, 2048)
    b = torch.randn(2048, 2048)
    weight = b.to(products or b.dtype)
    linear(a, weight)
    begun = time.perf_counter()
    for _ in range(8):
        linear(a, weight)
    product = 8 * 2 * a.shape[0] * b.numel() / (time.perf_counter() - begun)
    matrix = (b.T @ b / 2048 + torch.eye(2048)).numpy()
    begun = time.perf_counter()
    root(matrix)
    return product, matrix.shape[0] ** 3 / (time.perf_counter() - begun)
