"""What a machine says of itself, by answers in the form that nvidia-smi, sysctl and the kernel's files have."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import xent_quant
from xent_quant import machine
from xent_quant.errors import ConfigError
from xent_quant.machine import Card, Machine, System, card, installed, read
from xent_quant.options import Options

SMI = "NVIDIA GeForce RTX 3060, 12288, 11823\n"
TWO = "NVIDIA GeForce GTX 1650, 4096, 3911\nNVIDIA GeForce RTX 4070 Ti SUPER, 16376, 15101\n"
MAC = {"hw.memsize": "17179869184\n", "machdep.cpu.brand_string": "Apple M2 Pro\n"}


@pytest.fixture
def system(tmp_path: Path) -> System:
    """One that tells of nothing but 32 GiB of RAM."""
    return System(
        platform="linux",
        root=tmp_path,
        run=lambda *command: "",
        nvml=list,
        ram=lambda: 33_564_131_328,
        read_bandwidth=lambda: 41.7e9,
    )


def test_an_nvidia_card(system: System) -> None:
    asked = []
    of = card(replace(system, run=lambda *command: asked.append(command) or SMI))
    assert of == Card("NVIDIA GeForce RTX 3060", 12288 << 20, 11823 << 20)
    assert of.bandwidth == 360
    assert asked == [("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")]
    larger = card(replace(system, run=lambda *command: TWO))
    assert larger is not None
    assert (larger.name, larger.bandwidth) == ("NVIDIA GeForce RTX 4070 Ti SUPER", 672)
    for nothing in ("", "No devices were found\n", "NVIDIA GB10, [N/A], [N/A]\n"):
        assert card(replace(system, run=lambda *command, said=nothing: said)) is None
    by_library = replace(system, nvml=lambda: [("NVIDIA A10", 24 << 30, 23 << 30)], run=lambda *command: SMI)
    assert card(by_library) == Card("NVIDIA A10", 24 << 30, 23 << 30)


def test_a_card_of_the_kernel(system: System, tmp_path: Path) -> None:
    for number, (total, name) in enumerate((("536870912", ""), ("17163091968", "AMD Radeon RX 7800 XT"))):
        folder = tmp_path / "sys" / "class" / "drm" / f"card{number}" / "device"
        folder.mkdir(parents=True)
        (folder / "mem_info_vram_total").write_text(f"{total}\n")
        (folder / "mem_info_vram_used").write_text("1073741824\n")
        if name:
            (folder / "product_name").write_text(f"{name}\n")
    of = card(system)
    assert of == Card("AMD Radeon RX 7800 XT", 17163091968, 17163091968 - 2**30)
    assert of.bandwidth == 624


def test_a_mac_has_one_memory(system: System) -> None:
    mac = replace(system, platform="darwin", run=lambda *command: MAC.get(command[-1], ""))
    of = card(mac)
    assert of == Card("Apple M2 Pro", (16 << 30) * 2 // 3, unified=True)
    assert of.bandwidth == 200
    assert read(fit=True, ram=False, beside_ram=False, measure=False, system=mac)[0] == {
        "fit": "10.66GiB",
        "vram_bandwidth": "200GB/s",
    }
    with pytest.raises(ConfigError, match="--ram: this machine has one memory, which --fit auto counts for both; drop --ram"):
        read(fit=True, ram=True, beside_ram=True, measure=True, system=mac)
    assert card(replace(mac, run=lambda *command: {"hw.memsize": "1"}.get(command[-1], "Intel(R) Core(TM) i7"))) is None


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA GeForce RTX 3060 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3060 Ti", 448),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("Intel(R) Arc(TM) A770 Graphics", 560),
        ("Apple M4 Max", 546),
        ("Radeon", None),
        ("", None),
    ],
)
def test_bandwidth_is_the_card_s_own_or_unknown(name: str, bandwidth: int | None) -> None:
    assert Card(name, 1).bandwidth == bandwidth


def test_the_limit_of_a_container_counts(system: System, tmp_path: Path) -> None:
    assert installed(system) == 33_564_131_328
    folder = tmp_path / "sys" / "fs" / "cgroup"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    assert installed(system) == 33_564_131_328
    (folder / "memory.max").write_text("8589934592\n")
    assert installed(system) == 8 << 30
    assert installed(replace(system, ram=lambda: None, root=tmp_path / "nowhere")) is None


def test_what_is_read_is_what_could_be_typed(system: System) -> None:
    gpu = replace(system, run=lambda *command: SMI)
    found, said = read(fit=True, ram=True, beside_ram=True, measure=True, system=gpu)
    assert found == {"fit": "12GiB", "vram_bandwidth": "360GB/s", "ram": "31.25GiB", "ram_bandwidth": "42GB/s"}
    assert said == (
        "This machine: NVIDIA GeForce RTX 3060 with 12GiB, 11.54GiB of it free now, 31.25GiB of RAM, which is read with 42GB/s, "
        "measured."
    )
    options = Options(**found)
    assert (options.fit_bytes, options.planned) == (12 << 30, "fit12GiB-ram31.25GiB")
    assert options.bandwidths == {"vram_bandwidth": 360e9, "ram_bandwidth": 42e9}
    with pytest.raises(ConfigError, match=r"--fit auto: no GPU is found .*; write its memory, such as --fit 12GiB, or .* --ram"):
        read(fit=True, ram=False, beside_ram=False, measure=False, system=system)
    with pytest.raises(
        ConfigError, match="--ram auto: the system does not tell how much there is; write it, such as --ram 32GiB"
    ):
        read(fit=False, ram=True, beside_ram=True, measure=True, system=replace(system, ram=lambda: None))


def test_a_plan_for_this_machine(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "System", lambda: replace(system, run=lambda *command: SMI))
    options = {"method": "rtn", "context": 512}
    (auto,) = xent_quant.plan(fit="auto", ram="auto", ram_bandwidth="50GB/s", **options)
    typed = {"fit": "12GiB", "vram_bandwidth": "360GB/s", "ram": "31.25GiB", "ram_bandwidth": "50GB/s"}
    (same,) = xent_quant.plan(**typed, **options)
    assert auto.notes[0].startswith("This machine: NVIDIA GeForce RTX 3060 with 12GiB")
    assert replace(auto, notes=auto.notes[1:]) == same
    assert auto.command.startswith("llama-server -m xent-mini-fit12GiB-ram31.25GiB.gguf")


def test_this_machine_itself() -> None:
    """Whatever it is, it says how much RAM there is, and that is read in a time."""
    assert (installed(System()) or 0) > 2**28
    assert machine._read_bandwidth() > 1e8
    assert Machine().seconds((360e9, 51.2e9)) == 2


def test_every_bandwidth_that_is_measured_can_be_planned_with(system: System) -> None:
    for measured, said in ((9.96e9, "10GB/s"), (41.7e9, "42GB/s"), (123.4e9, "120GB/s"), (1.21e12, "1200GB/s")):
        of = replace(system, read_bandwidth=lambda found=measured: found)
        found, _ = read(fit=False, ram=True, beside_ram=True, measure=True, system=of)
        assert found["ram_bandwidth"] == said
        assert Options(**found).bandwidths == {"ram_bandwidth": float(said.removesuffix("GB/s")) * 1e9}


def test_a_card_without_memory_of_its_own_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library(ModuleType):
        class NVMLError(Exception):
            pass

        def nvmlInit(self) -> None:
            pass

        def nvmlDeviceGetCount(self) -> int:
            return 1

        def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
            return index

        def nvmlDeviceGetName(self, handle: int) -> str:
            return "NVIDIA GB10"

        def nvmlDeviceGetMemoryInfo(self, handle: int) -> None:
            raise self.NVMLError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", Library("pynvml"))
    assert machine._nvml() == []
