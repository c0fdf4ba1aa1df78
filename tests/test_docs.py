"""What the documents name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_a_document_names_is_there() -> None:
    found = 0
    for document in (ROOT / "docs").glob("*.md"):
        file = ""
        for named, test in re.findall(r"`(tests/[\w/]+\.py)?::(test_\w+)`", document.read_text("utf-8")):
            file = named or file
            assert f"def {test}(" in (ROOT / file).read_text("utf-8"), f"{document.name}: {file}::{test}"
            found += 1
    assert found > 50
