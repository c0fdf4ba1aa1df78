#!/usr/bin/env python3
"""Keeps README.md's help block equal to what `xent-quant --help` prints.

`scripts/readme_help.py` rewrites the block between the two markers, `--check` fails where it differs.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- help -->\n```\n).*?(\n```\n<!-- /help -->)", re.DOTALL)


def real_help() -> str:
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "TERM": "dumb"}
    command = [str(Path(sys.executable).with_name("xent-quant")), "--help"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the block differs")
    options = parser.parse_args()
    text = README.read_text("utf-8")
    if not BLOCK.search(text):
        sys.exit("README.md has no help block between <!-- help --> and <!-- /help -->")
    wanted = BLOCK.sub(lambda match: match[1] + real_help() + match[2], text)
    if options.check:
        if wanted != text:
            sys.exit("README.md: the help block differs from `xent-quant --help`; run scripts/readme_help.py")
        return
    README.write_text(wanted, "utf-8")


if __name__ == "__main__":
    main()
