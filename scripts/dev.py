#!/usr/bin/env python3
"""What scripts/setup, test, check, stock_llama and demo do, on any system. Needs nothing but Python 3.11 with venv and pip.

    scripts/dev.py setup [EXTRA ...]    makes .venv, with the project and the named extras; default: llama
    scripts/dev.py test [ARGUMENT ...]  sets up, and runs the tests; arguments go to pytest (`-m slow`: the long ones)
    scripts/dev.py check                sets up; lint, types, import directions, README's help block against the real one
    scripts/dev.py stock_llama [OPTION] sets up, and builds the programs of stock llama.cpp that tests marked `stock` need
    scripts/dev.py demo                 sets up, quantises the bundled miniature to 4 bits, lets stock llama.cpp write with it

scripts/setup, test, check, stock_llama and demo start this with the Python that the environment variable PYTHON names, else with
python3; on Windows: `py -3.11 scripts\\dev.py demo`.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = str(BIN / ("python.exe" if os.name == "nt" else "python"))
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
TORCH_CPU = "https://download.pytorch.org/whl/cpu"


def run(*command):
    """Run a program here, and leave with its status where it fails."""
    status = subprocess.call(command, cwd=str(ROOT))
    if status:
        sys.exit(status if status > 0 else 128 - status)


def become(*command):
    """The last program: it takes the place of this one where the system can do that, signals and all."""
    if os.name == "nt":
        run(*command)
    else:
        os.chdir(str(ROOT))
        os.execv(command[0], command)


def setup(extras):
    """Make .venv with the CPU build of torch that constraints.txt pins, and install the project with these extras. What was
    installed with the same files and extras before is left alone."""
    if not (Path(PYTHON).exists() and list(Path(PYTHON).parent.glob("pip*"))):  # pip comes last: one may be half made
        run(sys.executable, "-m", "venv", str(VENV))
    wanted = ",".join(extras or ["llama"])
    inputs = (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes() + (wanted + "\n").encode()
    stamp = VENV / (".installed-" + hashlib.sha256(inputs).hexdigest()[:16])
    if stamp.exists():
        return
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    # torch first and alone, the CPU build where it can be had: with it in place, no later requirement pulls in a CUDA one.
    quiet([*install, "--retries", "0", "--extra-index-url", TORCH_CPU, "torch"])
    run(*install, "--editable", ".[" + wanted + "]")
    stamp.touch()


def quiet(command):
    """`run` without pip's warnings: where the extra index cannot be reached, there is torch elsewhere."""
    with subprocess.Popen(command, cwd=str(ROOT), stderr=subprocess.PIPE) as process:
        for line in process.stderr:
            if not line.startswith(b"WARNING"):
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)


def test(arguments):
    """All default tests in a process for each core, four at most (each holds a GB); what arguments choose in one."""
    setup(["all", "dev"])
    become(PYTHON, "-m", "pytest", *(arguments or ["--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal"]))


def check(arguments):
    setup(["all", "dev"])
    run(PYTHON, "-m", "ruff", "check", ".")
    run(PYTHON, "-m", "mypy")
    run(str(BIN / "lint-imports"))
    become(PYTHON, str(ROOT / "scripts" / "readme_help.py"), "--check")


def stock_llama(arguments):
    setup(["all", "dev"])
    become(PYTHON, str(ROOT / "scripts" / "stock_llama.py"), *arguments)


def demo(arguments):
    setup(["llama"])
    output = ROOT / "out" / "demo"
    run(str(BIN / "xent-quant"), "--bits", "4", "--format", "gguf", "--tokens", "16k", "--output", str(output), "--force")
    written = max(output.glob("*.gguf"), key=lambda file: file.stat().st_mtime)  # others may be there from earlier
    become(PYTHON, str(ROOT / "scripts" / "generate.py"), str(written))


COMMANDS = {"setup": setup, "test": test, "check": check, "stock_llama": stock_llama, "demo": demo}


def main():
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if sys.version_info < (3, 11):  # noqa: UP036 - said by whatever was found
        version = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            "setup: Python 3.11 or newer is needed, Python " + version + " was found; set PYTHON=/path/to/python3.11, or start "
            "scripts/dev.py with it"
        )
    if name not in COMMANDS or (name in ("check", "demo") and arguments):
        sys.stderr.write(__doc__)
        sys.exit(0 if name in ("-h", "--help") else 2)
    if os.name == "nt":
        os.environ.setdefault("PYTHONUTF8", "1")  # Chinese, whatever the language of the system
    try:
        COMMANDS[name](arguments)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
