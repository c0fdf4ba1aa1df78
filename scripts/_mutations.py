"""Damage for files that others wrote: by the byte, and by what the format means. Everything is drawn from one `random.Random`.

A mutator is a function of (random, bytes of a good file) to the bytes of a damaged one.
"""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Mutate = Callable[[Random, bytes], bytes]

NODES = ("fifo", "folder", "missing", "link to itself", "link to /dev/zero")
"""What may stand in a file's place."""
NODE = b"\0instead: "
"""How an input begins that is one of NODES, its name behind it."""

INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 127, 128, 255, 256, 1000, 4095, 65535, 65536, 10**6, 2**24),
    *(2**31 - 1, 2**31, 2**32 - 1),
)
HUGE = (2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a",
        "0",
        "-1",
        "3",
        "1e400",
        "NaN",
        "null",
        "true",
        "false",
        "True",
        "默认",
        "\u202e",
        "\ufeff",
        "\U0001f600",
    ),
    *("../x", "/etc/passwd", "..", ".", "a/b", "C:\\x", "http://x", "[/b]", "[bold]", "{{ x }}", "%s", "\x1b[31m", "a\nb"),
    *("model.safetensors", "model.layers.0.mlp.router.weight", "lm_head.weight", "F32", "BF16", "F8_E4M3", "xverse", "yarn"),
    "x" * 70_000,
)


class Raw(str):
    """Text that stands in JSON as it is."""


NUMBERS = (
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "-Infinity",
    "9" * 5000,
    "-" + "9" * 4000,
    "1" + "0" * 400,
    "0.1e-400",
    "-0.0",
    "1E5",
)
RAW = (
    *map(Raw, NUMBERS),
    Raw('"\\ud800"'),
    Raw('"\\udc00\\ud800"'),
    Raw('"\\u0000"'),
    Raw("[" * 100_000),
    Raw("[" * 100_000 + "]" * 100_000),
    Raw('{"a":' * 100_000),
    Raw("[" * 900 + "]" * 900),
    Raw('{"a":' * 400 + "1" + "}" * 400),
    Raw("[" + "0," * 50_000 + "0]"),
    Raw("nul"),
    Raw("'a'"),
    Raw(""),
)


def pairs_of(value: Any) -> Any:
    """JSON's objects as lists of pairs in a tuple, which may hold a name twice."""
    if isinstance(value, dict):
        return ("object", [[key, pairs_of(item)] for key, item in value.items()])
    return [pairs_of(item) for item in value] if isinstance(value, list) else value


def dumped(value: Any, ascii_only: bool) -> str:
    """The text of what `pairs_of` gave."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, tuple):
        return "{" + ", ".join(f"{dumped(k, ascii_only)}: {dumped(v, ascii_only)}" for k, v in value[1]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(dumped(item, ascii_only) for item in value) + "]"
    return json.dumps(value, ensure_ascii=ascii_only)


def _places(value: Any, limit: int = 4000) -> list[tuple[list[Any], int]]:
    """(list, index) of every value within; of pairs the value's."""
    found: list[tuple[list[Any], int]] = []
    open_ = [value]
    while open_ and len(found) < limit:
        item = open_.pop()
        holders = [(pair, 1) for pair in item[1]] if isinstance(item, tuple) else [(item, n) for n in range(len(item))]
        for holder, index in holders:
            found.append((holder, index))
            if isinstance(holder[index], list | tuple):
                open_.append(holder[index])
    return found


def _objects(value: Any) -> list[list[Any]]:
    """The pairs of every object within."""
    inner = [holder[index] for holder, index in _places(value)]
    return [item[1] for item in (value, *inner) if isinstance(item, tuple) and item[1]]


def other(random: Random, value: Any) -> Any:
    """Something else in place of a value: of another type, or near it, or far from it."""
    choice = random.randrange(8)
    if choice == 0:
        return random.choice(RAW)
    if choice == 1:
        return random.choice((None, True, False, [], ("object", []), 0, -1, 0.5, "", [None], [[]], ("object", [["a", 1]])))
    if choice == 2:
        return random.choice(TEXTS)
    if choice == 3:
        return random.choice((1, -1)) * random.choice((*INTEGERS, *HUGE))
    if choice == 4 and isinstance(value, int | float) and not isinstance(value, bool):
        return random.choice(
            (value + 1, value - 1, -value, value * 2, value // 2 if value == value else 0, float(value), value * 10**9)
        )
    if choice == 4 and isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return random.choice(
            (value[:cut], value + value, value.upper(), value[::-1], value[:cut] + "\0" + value[cut:], value + " ")
        )
    if choice == 5:
        return random.choice((str(value)[:100], [value], ("object", [["content", value]]), json.dumps(str(value)[:100])))
    if choice == 6 and isinstance(value, list) and value:
        at = random.randrange(len(value))
        return random.choice((value[:at], value[at:], value * 2, value[::-1], [*value, value[at]], [value[at]] * 1000))
    return random.choice((1e308, 1e-320, 2.0**53, 10**18, -(2**63), [1] * 1000, "0" * 1000))


def mutate_tree(random: Random, tree: Any) -> Any:
    """One change to what `pairs_of` gave."""
    places, objects = _places(tree), _objects(tree)
    if not places:
        return other(random, tree)
    choice = random.randrange(10)
    if choice < 6 or not objects:
        holder, index = random.choice(places)
        holder[index] = other(random, holder[index])
        return tree
    pairs = random.choice(objects)
    if choice == 6:
        del pairs[random.randrange(len(pairs))]
    elif choice == 7:
        key, value = random.choice(pairs)
        pairs.append([key, other(random, value) if random.random() < 0.5 else value])
    elif choice == 8:
        random.choice(pairs)[0] = random.choice((*TEXTS, random.choice(random.choice(objects))[0], Raw('"\\ud800"')))
    else:
        one, two = random.choice(places), random.choice(places)
        one[0][one[1]] = two[0][two[1]] if not isinstance(two[0][two[1]], list | tuple) else "swapped"
    return tree


def text_of_tree(random: Random, value: Any) -> str:
    tree = pairs_of(value)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        tree = mutate_tree(random, tree)
        if not isinstance(tree, list | tuple):
            break
    return dumped(tree, random.random() < 0.5)


def as_json(random: Random, data: bytes) -> bytes:
    """JSON: another value, type, name or number somewhere in it; a name twice; now and then damaged bytes."""
    made = text_of_tree(random, json.loads(data)).encode("utf-8", "surrogatepass")
    choice = random.randrange(20)
    if choice == 0:
        return random.choice(
            (b"\xef\xbb\xbf" + made, made.decode("utf-8", "replace").encode("utf-16"), b"\0" + made, made + made)
        )
    return as_bytes(random, made) if choice == 1 else made


def as_json_lines(random: Random, data: bytes) -> bytes:
    """Lines of JSON, one or two of them damaged."""
    lines = data.split(b"\n")
    for at in random.sample(range(len(lines)), random.choice((1, 1, 2))):
        lines[at] = as_json(random, lines[at]) if lines[at].strip() and random.random() < 0.8 else as_bytes(random, lines[at])
    return b"\n".join(lines)


def as_bytes(random: Random, data: bytes) -> bytes:
    """Whatever the format: bits, bytes, ranges, lengths, ends."""
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 20))):
        at = random.randrange(len(raw) + 1) if random.random() < 0.5 else random.randrange(min(len(raw), 300) + 1)
        size = random.choice((1, 2, 4, 8, 16, 100, 1000))
        choice = random.randrange(10)
        if choice == 0 and raw:
            raw[at % len(raw)] ^= 1 << random.randrange(8)
        elif choice == 1:
            raw[at : at + size] = random.randbytes(size)
        elif choice == 2:
            del raw[at : at + size]
        elif choice == 3:
            raw[at:at] = random.randbytes(size)
        elif choice == 4:
            raw[at:at] = raw[at : at + size] * random.choice((1, 2, 50))
        elif choice == 5:
            raw[at : at + size] = bytes(min(size, len(raw) - at))
        elif choice == 6:
            form = random.choice(("<I", "<Q", ">I", "<H"))
            number = random.choice((*INTEGERS, *HUGE)) & (1 << 8 * struct.calcsize(form)) - 1
            raw[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif choice == 7:
            raw[at : at + size] = b"\xff" * size
        elif choice == 8 and random.random() < 0.3:
            del raw[at:]
        elif choice == 9 and random.random() < 0.1:
            raw[:] = random.choice((b"", b"\0", b"\0" * 5000, random.randbytes(500), bytes(raw[::-1])))
    return bytes(raw)


def as_text(random: Random, data: bytes) -> bytes:
    """Text: in another encoding, with characters that are none, with what markup and templates take for theirs."""
    choice = random.randrange(6)
    if choice == 0:
        text = data.decode("utf-8", "replace")
        encoding = random.choice(
            ("utf-16", "utf-16-be", "utf-32", "gb18030", "big5", "cp1252", "utf-8-sig", "utf-7", "shift_jis")
        )
        made = text.encode(encoding, "replace")
        return as_bytes(random, made) if random.random() < 0.5 else made
    if choice < 3:
        text = data.decode("utf-8", "replace")
        for _ in range(random.choice((1, 3, 10))):
            at = random.randrange(len(text) + 1)
            piece = random.choice(
                (*TEXTS, "\n", "\r", "---", '"', "'", "{%", "%}", "{{", "}}", "<", ">", "&#x110000;", "\ud800", ",", "\t")
            )
            text = text[:at] + piece * random.choice((1, 1, 3)) + text[at + random.choice((0, 0, 5, 50)) :]
        return text.encode("utf-8", "surrogatepass")
    return as_bytes(random, data)


def as_safetensors(random: Random, data: bytes) -> bytes:
    """The header's JSON, its length, or the bytes behind."""
    length = int.from_bytes(data[:8], "little")
    choice = random.randrange(10)
    if choice < 6:
        header = text_of_tree(random, json.loads(data[8 : 8 + length])).encode("utf-8", "surrogatepass")
        told = len(header) if random.random() < 0.9 else random.choice((*INTEGERS, *HUGE)) & 2**64 - 1
        return told.to_bytes(8, "little") + header + data[8 + length :]
    if choice == 6:
        return (random.choice((*INTEGERS, *HUGE)) & 2**64 - 1).to_bytes(8, "little") + data[8:]
    if choice == 7:  # values
        raw = bytearray(data)
        for _ in range(random.choice((1, 5))):
            at = 8 + length + random.randrange(len(raw) - length - 8) // 4 * 4
            raw[at : at + 4] = random.choice(
                (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\1\0\0\0")
            )
        return bytes(raw)
    return as_bytes(random, data)


def as_gguf(random: Random, data: bytes) -> bytes:
    """One or more of a GGUF's fields: counts, types, lengths, names, dimensions, offsets; or any bytes."""
    if random.random() < 0.3 or not data.startswith(b"GGUF"):
        return as_bytes(random, data)
    places = gguf_places(data)
    raw = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        at, form = random.choice(places)
        if form == "text":
            raw[at] = random.choice((0, 0xFF, 0x80, raw[at] ^ 1, ord("/")))
            continue
        size = struct.calcsize(form)
        near = int.from_bytes(raw[at : at + size], "little") + random.choice((1, -1, 32, -32))
        value = random.choice((random.choice(INTEGERS), random.choice(HUGE), near, random.randrange(1 << 8 * size)))
        raw[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(raw)


GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def gguf_places(data: bytes) -> list[tuple[int, str]]:
    """(offset, struct format) of every field of a GGUF's header; of text its first byte, as "text"."""
    places: list[tuple[int, str]] = [(0, "<I"), (4, "<I"), (8, "<Q"), (16, "<Q")]
    at = 24

    def number(form: str) -> int:
        nonlocal at
        places.append((at, form))
        size = struct.calcsize(form)
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> None:
        nonlocal at
        size = number("<Q")
        if size:
            places.append((at, "text"))
        at += size

    def value(kind: int) -> None:
        nonlocal at
        if kind == STRING:
            text()
        elif kind == ARRAY:
            inner, count = number("<I"), number("<Q")
            if inner in (STRING, ARRAY):
                for _ in range(count):
                    value(inner)
            else:
                places.extend((at + n * GGUF_SIZES[inner], "<B") for n in range(min(count, 3)))
                at += count * GGUF_SIZES[inner]
        else:
            places.append((at, {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}[GGUF_SIZES[kind]]))
            at += GGUF_SIZES[kind]

    tensors, pairs = struct.unpack("<QQ", data[8:24])
    for _ in range(pairs):
        text()
        value(number("<I"))
    # Long lists of tokens would take all the damage.
    places = places[:60] + [place for n, place in enumerate(places[60:]) if len(places) < 400 or n % (len(places) // 200) == 0]
    kept = len(places)
    for _ in range(tensors):
        text()
        for _ in range(number("<I")):
            number("<Q")
        number("<I")
        number("<Q")
    return places + places[kept:] * (1 if len(places) > 2 * kept else 2)


def as_zip(inner: Mutate) -> Mutate:
    """A zip's members, damaged by `inner`, packed again; or its own bytes."""

    def mutate(random: Random, data: bytes) -> bytes:
        if random.random() < 0.3:
            return as_bytes(random, data)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
        at = random.randrange(len(members))
        choice = random.randrange(8)
        if choice == 0:
            del members[at]
        elif choice == 1:
            members.append(members[at])
        elif choice == 2:
            members[at][0].filename = random.choice(("../x", "/x", "", "a" * 300, "META-INF/container.xml"))
        else:
            members[at] = (members[at][0], inner(random, members[at][1]))
        made = io.BytesIO()
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(made, "w") as archive:  # of names that come twice
            for info, content in members:
                archive.writestr(
                    zipfile.ZipInfo(info.filename),
                    content,
                    random.choice((0, 8)) if random.random() < 0.1 else info.compress_type,
                )
        return made.getvalue()

    return mutate


def one_of(*mutators: Mutate) -> Mutate:
    def mutate(random: Random, data: bytes) -> bytes:
        return random.choice(mutators)(random, data)

    return mutate


def damaged(random: Random, seeds: Sequence[bytes], mutate: Mutate) -> bytes:
    """An input: mostly one of the good files, damaged; now and then something else in the file's place."""
    if random.random() < 0.01:
        return NODE + random.choice(NODES).encode()
    return mutate(random, random.choice(seeds))


def as_onnx(random: Random, data: bytes) -> bytes:
    """An ONNX graph's initialisers (dimensions, types, places in the data file), nodes and attributes; or any bytes."""
    if random.random() < 0.3:
        return as_bytes(random, data)
    import onnx

    model = onnx.load_model_from_string(data)
    graph = model.graph
    for _ in range(random.choice((1, 1, 2, 3))):
        tensor, node = random.choice(graph.initializer), random.choice(graph.node)
        choice = random.randrange(12)
        number = random.choice((1, -1)) * random.choice((*INTEGERS, *HUGE[:5]))
        if choice < 3 and tensor.external_data:
            entry = random.choice(tensor.external_data)
            places = (
                "../model.onnx.data",
                "/etc/passwd",
                "..",
                "",
                "model.onnx",
                "other",
                "a/../model.onnx.data",
                "config.json",
                "x\0y",
            )
            numbers = (str(number), "x", "", "1e3", "-4", " 64", "٣", "0x10", "9" * 5000)
            entry.value = random.choice(places if entry.key == "location" else numbers)
        elif choice == 3 and tensor.external_data:
            if random.random() < 0.5:
                random.choice(tensor.external_data).key = "x"
            else:
                del tensor.external_data[random.randrange(len(tensor.external_data))]
        elif choice == 4:
            tensor.dims[:] = random.choice(
                ([], [number], [*tensor.dims, 1], [*tensor.dims[:-1], number], [0] * 3, tensor.dims[::-1])
            )
        elif choice == 5:
            tensor.data_type = random.choice((*range(25), 2**31 - 1))
        elif choice == 6:
            tensor.name = random.choice((*TEXTS[:10], node.name, random.choice(graph.initializer).name))
        elif choice == 7:
            which = random.choice((graph.initializer, graph.node))
            if random.random() < 0.7:
                del which[random.randrange(len(which))]
            else:
                which.add().CopyFrom(random.choice(which))
        elif choice == 8 and node.attribute:
            attribute = random.choice(node.attribute)
            attribute.i = max(-(2**63), min(number, 2**63 - 1))
            attribute.type = random.choice((attribute.type, attribute.type, *range(14)))
        elif choice == 9 and node.attribute:
            random.choice(node.attribute).name = random.choice(TEXTS[:10])
        elif choice == 10 and node.input:
            node.input[random.randrange(len(node.input))] = random.choice((tensor.name, "", "x"))
        elif choice == 11:
            node.op_type = random.choice(("MatMul", "QMoE", "Loop", "", "x"))
        if not graph.initializer or not graph.node:
            break
    made: bytes = model.SerializeToString()
    return made
