"""The machine that a plan is for: its memories and how fast they are read, as they were given or as this machine says.

All that is asked of the system goes through `System`.
"""

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from xent_quant.errors import ConfigError

VRAM_BANDWIDTH = 360e9
"""Bytes a second where none are given and the card is not known: those of an RTX 3060."""
RAM_BANDWIDTH = 51.2e9
"""The same of RAM: two channels of DDR4-3200 (of DDR5-5600 they have 89.6e9)."""

# fmt: off
BANDWIDTHS = {
    "GeForce": {
        "RTX 3050": 224, "RTX 3060": 360, "RTX 3060 Ti": 448, "RTX 3070": 448, "RTX 3070 Ti": 608, "RTX 3080": 760,
        "RTX 3080 Ti": 912, "RTX 3090": 936, "RTX 3090 Ti": 1008,
        "RTX 4060": 272, "RTX 4060 Ti": 288, "RTX 4070": 504, "RTX 4070 SUPER": 504, "RTX 4070 Ti": 504,
        "RTX 4070 Ti SUPER": 672, "RTX 4080": 717, "RTX 4080 SUPER": 736, "RTX 4090": 1008,
        "RTX 5050": 320, "RTX 5060": 448, "RTX 5060 Ti": 448, "RTX 5070": 672, "RTX 5070 Ti": 896, "RTX 5080": 960,
        "RTX 5090": 1792,
    },
    "NVIDIA": {
        "RTX A2000": 288, "RTX A4000": 448, "RTX A4500": 640, "RTX A5000": 768, "RTX A6000": 768,
        "A10": 600, "A30": 933, "A40": 696, "A100-PCIE-40GB": 1555, "A100-SXM4-40GB": 1555, "A100 80GB PCIe": 1935,
        "A100-SXM4-80GB": 2039,
    },
    "Radeon": {
        "RX 6600": 224, "RX 6600 XT": 256, "RX 6650 XT": 280, "RX 6700 XT": 384, "RX 6750 XT": 432, "RX 6800": 512,
        "RX 6800 XT": 512, "RX 6900 XT": 512, "RX 6950 XT": 576,
        "RX 7600": 288, "RX 7600 XT": 288, "RX 7700 XT": 432, "RX 7800 XT": 624, "RX 7900 GRE": 576, "RX 7900 XT": 800,
        "RX 7900 XTX": 960, "RX 9060 XT": 320, "RX 9070": 640, "RX 9070 XT": 640,
    },
    "Arc": {"A380": 186, "A580": 512, "A750": 512, "A770": 560, "B570": 380, "B580": 456},
    "Apple": {
        "M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800, "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
        "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819, "M4": 120, "M4 Pro": 273, "M4 Max": 546,
    },
}
# fmt: on
"""GB a second of VRAM by the name of a line of cards and the card's behind it, makers' figures as they are commonly given, not
looked up one by one; of cards that were sold with several memories the commonest."""

MEASURED_BYTES = 256 * 2**20
"""Of RAM that is read to measure how fast it is; more than caches hold."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes of a GPU's memory, None where there is no GPU, and of RAM, None where it is not limited; and how many bytes of them
    can be read in a second."""

    vram: int | None = None
    ram: int | None = None
    vram_bandwidth: float = VRAM_BANDWIDTH
    ram_bandwidth: float = RAM_BANDWIDTH

    @property
    def memory(self) -> tuple[int | None, int | None]:
        """VRAM, RAM."""
        return self.vram, self.ram

    @property
    def bandwidths(self) -> tuple[float, float]:
        """Of VRAM and RAM."""
        return self.vram_bandwidth, self.ram_bandwidth

    def seconds(self, read: Sequence[float]) -> float:
        """Of reading so many bytes of VRAM and of RAM, one after the other: no token is made in less."""
        return sum(nbytes / bandwidth for nbytes, bandwidth in zip(read, self.bandwidths, strict=True))


def _run(*command: str) -> str:
    """What a program says; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvml() -> list[tuple[str, int, int]]:
    """Of every NVIDIA card its name, and bytes in all and free; nothing without the package pynvml or a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    found = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            name, memory = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append((name if isinstance(name, str) else name.decode(), int(memory.total), int(memory.free)))
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # also of cards that have no memory of their own
        return []
    return found


def _ram() -> int | None:
    """Bytes of RAM; None where the system does not say."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)()  # MEMORYSTATUSEX: its length and a percentage in the first eight bytes, the total next
        ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
        return int(status[1]) if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


@cache
def _read_bandwidth() -> float:
    """Bytes a second at which all cores together read RAM, the best of a few tries; takes a fraction of a second."""
    cores = os.cpu_count() or 1
    parts = np.array_split(np.ones(MEASURED_BYTES // 4, np.float32), cores)
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(4):
            begun = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, MEASURED_BYTES / (time.perf_counter() - begun))
    return best


@dataclass(frozen=True)
class System:
    """What is asked of the system; tests give answers of their own."""

    platform: str = sys.platform
    root: Path = Path("/")
    run: Callable[..., str] = _run
    nvml: Callable[[], list[tuple[str, int, int]]] = _nvml
    ram: Callable[[], int | None] = _ram
    read_bandwidth: Callable[[], float] = _read_bandwidth


@dataclass(frozen=True)
class Card:
    """A GPU: its name, where that is known, bytes of its memory, and how many of them are free, where that is known. `unified`:
    the memory is the computer's."""

    name: str
    vram: int
    free: int | None = None
    unified: bool = False

    @property
    def bandwidth(self) -> int | None:
        """GB a second, by name; None for one that is not among BANDWIDTHS (a laptop's has the name of another card in it)."""
        words = re.sub(r"\((R|TM)\)| Graphics$", "", self.name).split()
        line = next((each for each in BANDWIDTHS if each in words), None)
        return BANDWIDTHS[line].get(" ".join(words[words.index(line) + 1 :])) if line else None


def card(system: System) -> Card | None:
    """The GPU with the most memory; None where the system tells of none."""
    found = [Card(*each) for each in system.nvml()] or list(_nvidia_smi(system)) or [*_sysfs(system), *_apple(system)]
    return max(found, key=lambda each: each.vram, default=None)


def _nvidia_smi(system: System) -> "list[Card]":
    said = system.run("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in said.splitlines()]
    return [Card(row[0], int(row[1]) << 20, int(row[2]) << 20) for row in rows if row[1:] and all(map(str.isdigit, row[1:]))]


def _sysfs(system: System) -> "list[Card]":
    """Cards of drivers that tell of their memory there, as AMD's does."""
    found = []
    for file in sorted(system.root.glob("sys/class/drm/card*/device/mem_info_vram_total")):
        total, used, name = (_text(file.with_name(each)) for each in (file.name, "mem_info_vram_used", "product_name"))
        if total.isdigit():
            found.append(Card(name, int(total), int(total) - int(used) if used.isdigit() else None))
    return found


def _apple(system: System) -> "list[Card]":
    """A Mac's, by Metal's recommended working set: two thirds of its memory up to 36 GiB, three quarters above."""
    if system.platform != "darwin":
        return []
    memory, name = (system.run("sysctl", "-n", key).strip() for key in ("hw.memsize", "machdep.cpu.brand_string"))
    if not memory.isdigit() or not name.startswith("Apple"):
        return []
    total = int(memory)
    return [Card(name, total * 2 // 3 if total <= 36 << 30 else total * 3 // 4, unified=True)]


def installed(system: System) -> int | None:
    """Bytes of RAM that processes here may take, a container's limit counted; None where the system does not say."""
    files = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits = [int(text) for text in (_text(system.root / file) for file in files) if text.isdigit()]
    return min((each for each in (system.ram(), *limits) if each), default=None)


def _text(file: Path) -> str:
    """What a file of the system says; nothing where it is not there."""
    try:
        return file.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""


def read(*, fit: bool, ram: bool, beside_ram: bool, measure: bool, system: System | None = None) -> tuple[dict[str, str], str]:
    """What this machine has, as options, and what to say of it: its VRAM for a plan that asks for that (`fit`), its RAM (`ram`),
    and how fast that is read (`measure`). `beside_ram`: the plan has RAM, asked for or given. Memory is all that there is, not
    what is free at the moment, so that the same command gives the same plan. Raises ConfigError that says what to write where
    the system does not tell."""
    asked = system or System()
    found, said = {}, []
    if fit:
        gpu = card(asked)
        if gpu is None:
            raise ConfigError(
                "--fit auto: no GPU is found (by NVML, nvidia-smi, /sys/class/drm or sysctl); "
                "write its memory, such as --fit 12GiB, or plan a GGUF for the CPU with --ram alone"
            )
        if gpu.unified and beside_ram:
            raise ConfigError("--ram: this machine has one memory, which --fit auto counts for both; drop --ram")
        found["fit"] = _gib(gpu.vram)
        if gpu.bandwidth:
            found["vram_bandwidth"] = f"{gpu.bandwidth}GB/s"
        free = "" if gpu.free is None else f", {_gib(gpu.free)} of it free now"
        said.append(f"{gpu.name or 'a GPU'} with {_gib(gpu.vram)}{free}{'' if gpu.bandwidth else ', bandwidth unknown'}")
    if ram:
        nbytes = installed(asked)
        if nbytes is None:
            raise ConfigError("--ram auto: the system does not tell how much there is; write it, such as --ram 32GiB")
        found["ram"] = _gib(nbytes)
        said.append(f"{found['ram']} of RAM")
    if measure:
        found["ram_bandwidth"] = f"{float(f'{asked.read_bandwidth() / 1e9:.2g}'):g}GB/s"
        said.append(f"which is read with {found['ram_bandwidth']}, measured")
    return found, f"This machine: {', '.join(said)}."


def _gib(nbytes: int) -> str:
    """As options have it, rounded down."""
    return f"{nbytes * 100 // 2**30 / 100:g}GiB"
