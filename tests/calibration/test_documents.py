"""Files to documents: every kind and encoding against the standard library's own writers, bounds, and hostile files."""

import csv
import gzip
import json
import random
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest

from calibration import characters, documents, json_rows
from calibration.characters import lines
from calibration.documents import READERS
from calibration.notes import Notes
from calibration.text import SUITES, suite_path
from xent_quant.errors import CalibrationError

CHINESE = suite_path("fiction-zh").read_text("utf-8")
# Traditional characters, which Big5 has; from 紅樓夢, chapter 1.
TRADITIONAL = (
    "此開卷第一回也。作者自云：因曾歷過一番夢幻之後，故將真事隱去，而借通靈之說，撰此《石頭記》一書也。"
    "故曰甄士隱云云。但書中所記何事何人？自又云：今風塵碌碌，一事無成，忽念及當日所有之女子，一一細考較去，"
    "覺其行止見識，皆出於我之上。何我堂堂鬚眉，誠不若彼裙釵哉？"
)


def read(path: Path, **options: Any) -> list[str]:
    return list(documents.documents(path, **options))


def told(path: Path, **options: Any) -> tuple[list[str], str]:
    notes = Notes()
    texts = read(path, notes=notes, **options)
    return texts, "\n".join(notes.lines())


def refused(path: Path, content: bytes | str, **options: Any) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CalibrationError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def epub(chapters: Mapping[str, str | bytes], spine: list[str] | None = None, **extra: str) -> bytes:
    """A book with its pages in OEBPS/text/; `spine` names pages by id, which is the name without suffix."""
    items = "".join(f'<item id="{name[:-6]}" href="text/{name}" media-type="application/xhtml+xml"/>' for name in chapters)
    refs = "".join(f'<opf:itemref idref="{name}"/>' for name in spine or [name[:-6] for name in chapters])
    files = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<?xml version="1.0"?><rootfiles><rootfile full-path="OEBPS/content.opf"/></rootfiles>',
        "OEBPS/content.opf": f"<package><opf:manifest>{items}<item id='css' href='a.css' media-type='text/css'/></opf:manifest>"
        f"<spine>{refs}</spine></package>",
        **{f"OEBPS/text/{name}": page for name, page in chapters.items()},
        **extra,
    }
    made = BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, page in files.items():
            archive.writestr(name, page)
    return made.getvalue()


# Encodings


@pytest.mark.parametrize(
    ("codec", "text", "note"),
    [
        ("utf-8", CHINESE, ""),
        ("utf-8-sig", CHINESE, ""),
        ("utf-16", CHINESE, "UTF-16 (byte order mark)"),
        ("utf-32", CHINESE, "UTF-32 (byte order mark)"),
        ("gb18030", CHINESE, "GB18030"),
        ("gb18030", "x" * 300_000 + "\n" + CHINESE, "GB18030"),
        ("big5", TRADITIONAL, "Big5"),
        ("cp1252", "“The café’s façade,” she said — it wasn’t naïve. " * 20, "Windows-1252"),
    ],
)
def test_encodings_are_told_and_read_right(tmp_path: Path, codec: str, text: str, note: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode(codec))
    texts, notes = told(tmp_path / "a.txt")
    assert texts == [part.strip("\n") for part in text.split(f"{documents.SEPARATOR}\n")]
    assert (note in notes) if note else not notes


def test_every_suite_in_gb18030_is_told_from_its_first_hundreds_of_bytes(tmp_path: Path) -> None:
    for suite in SUITES:
        if suite.endswith("zh"):
            text = suite_path(suite).read_text("utf-8").replace(documents.SEPARATOR, "")[:700].strip()
            (tmp_path / "a.txt").write_bytes(text.encode("gb18030"))
            assert read(tmp_path / "a.txt") == [text]


def test_pieces_cut_characters_and_line_ends_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "夜色\r\n好 😀\rthe end\n"
    for size in (1, 2, 3, 5):
        monkeypatch.setattr(characters, "CHUNK", size)
        for codec in ("utf-8-sig", "utf-16", "utf-8"):
            stream = BytesIO(text.encode(codec))
            got = "".join(characters.characters(stream, tmp_path, Notes()))
            assert got == "夜色\n好 😀\nthe end\n"
    for longest in (1, 3, 100):
        assert "".join(lines(iter(["ab", "c\nd", "", "\n", "e"]), longest)) == "abc\nd\ne"
    assert list(lines(iter(["ab", "c\nd", "\n", "e"]), 100)) == ["abc\n", "d\n", "e"]


def test_what_is_no_text_is_refused_or_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv"):
        for content in (b"\x7fELF\0\0\0" + bytes(range(256)), b"text" * 50_000 + b"\0", b"\xff\xfe\0\0\0\0\0\0" * 9):
            assert "binary" in refused(tmp_path / name, content) or name != "a.txt"
    assert "byte 9" in refused(tmp_path / "a.txt", "夜色好".encode() + b"\xff" + CHINESE.encode())
    assert "byte 70,000" in refused(tmp_path / "a.txt", b"a" * 70_000 + b"\xff" + CHINESE.encode())
    assert "convert" in refused(tmp_path / "a.txt", "好的".encode("gb18030"))
    assert "convert" in refused(tmp_path / "a.txt", bytes(random.Random(0).choices(range(128, 256), k=3000)))
    (tmp_path / "a.txt").write_text("\ufeffone\x1b[0m\ftwo\ufeff\x85")
    texts, notes = told(tmp_path / "a.txt")
    assert texts == ["one[0m\ntwo"]
    assert "3 control characters" in notes
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 \\u0000 whole \\ud83d\\ude00"}')
    assert read(tmp_path / "a.jsonl") == ["half   whole 😀"]


# Rows


ROWS = [{"text": "one", "id": 1}, {"text": 'zwei\n„drei“, "vier"; 五', "id": 2}, {"text": "", "id": 3}, {"text": "end", "id": 4}]
TEXTS = ["one", 'zwei\n„drei“, "vier"; 五', "end"]


def table(delimiter: str) -> str:
    made = StringIO()
    writer = csv.DictWriter(made, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return made.getvalue()


def files() -> dict[str, bytes]:
    """The same three texts in every kind of file."""
    import pyarrow
    from pyarrow import parquet

    pages = {
        f"{number}.xhtml": "<?xml version='1.0'?><html><head><title>no</title></head><body><p>"
        + text.replace("\n", "<br/>")
        + "</p></body></html>"
        for number, text in enumerate(TEXTS)
    }
    stream = BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream, row_group_size=2)
    made = {
        ".txt": f"\n{documents.SEPARATOR}\n".join(TEXTS).encode(),
        ".md": f"\n{documents.SEPARATOR}\n".join(TEXTS).encode(),
        ".jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        ".json": json.dumps(ROWS, indent=1).encode(),
        ".csv": table(",").encode(),
        ".tsv": table("\t").encode(),
        ".parquet": stream.getvalue(),
        ".epub": epub(pages),
    }
    assert made.keys() == READERS.keys()
    return made


def packed(content: bytes) -> dict[str, bytes]:
    import pyarrow

    return {"": content, ".gz": gzip.compress(content), ".zst": pyarrow.compress(content, codec="zstd", asbytes=True)}


@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_packed_and_not(tmp_path: Path, suffix: str) -> None:
    wanted = ["\n\n".join(TEXTS)] if suffix == ".epub" else TEXTS
    for end, content in packed(files()[suffix]).items():
        path = tmp_path / f"a{suffix}{end}"
        path.write_bytes(content)
        assert read(path) == wanted
        if end:
            path.write_bytes(content[: len(content) // 2])
            with pytest.raises(CalibrationError, match=r"unpacked"):
                read(path)


def test_packed_streams_one_behind_the_other_are_one_file(tmp_path: Path) -> None:
    for (end, one), two in zip(packed(b"one").items(), packed(b" two").values(), strict=True):
        (tmp_path / f"a.txt{end}").write_bytes(one + two)
        assert read(tmp_path / f"a.txt{end}") == ["one two"]


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst"])
def test_without_pyarrow_the_extra_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'xent-quant[parquet]'" in refused(tmp_path / name, b"x")


def test_shapes_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    shapes = {
        '["a", "b"]': ["a", "b"],
        '[{"text": "a"}, "b", {"text": null}]': ["a", "b"],
        '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}': ["a", "b"],
        '{"text": "a", "tags": ["x"]}': ["a"],
        '{"tags": ["x"], "text": "a"}\n{"tags": ["y"], "text": "b"}\n': ["a", "b"],
        '"a"': ["a"],
        "[]": [],
        "": [],
        '{"text": ["a", "b"]}': ["a", "b"],
    }
    for size in (1 << 16, 1):
        monkeypatch.setattr(characters, "CHUNK", size)
        for content, wanted in shapes.items():
            path.write_text(content)
            assert read(path) == wanted, content
    assert "'a', 'b'" in refused(path, '[{"a": "x", "b": 1}]')
    assert "row 2" in refused(path, '[{"text": "x"}, {"text": 12}]')
    assert "several lists" in refused(path, '{"a": [], "b": []}')
    assert "line 3" in refused(path, '[{"text": "x"},\n\n{"text" "y"}]')
    assert "line 1" in refused(path, "12")
    for bad in ("[" * 100_000, '{"text":' * 100_000, "[1" + "0" * 5000 + "]", '[{"text": "x"}', '["a" "b"]', "[,]", "nul"):
        assert "not JSON" in refused(path, bad)


def test_long_rows_are_cut_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ROW at 4,000 characters: strings of 30,000, escapes and all, come cut, and what follows comes whole."""
    monkeypatch.setattr(documents, "ROW", 4000)
    monkeypatch.setattr(json_rows, "ROW", 4000)
    long = '夜\n"色\\😀' * 20_000
    for size in (100, 1 << 16):
        monkeypatch.setattr(characters, "CHUNK", size)
        for ascii_only in (True, False):
            rows = [json.dumps({"x": long, "text": text}, ensure_ascii=ascii_only) for text in (long, "short", "\\" * 9000)]
            (tmp_path / "a.jsonl").write_text("\n".join(rows))
            (tmp_path / "a.json").write_text("[" + ",".join(rows) + "]")
            (tmp_path / "b.json").write_text('{"meta": {"a": [1]}, "rows": [' + ",".join(rows) + '], "end": 1}')
            for name in ("a.jsonl", "a.json", "b.json"):
                one, two, three = read(tmp_path / name)
                assert two == "short"
                # Cut at 500 characters as they are written: 30 of "夜\n\"色\\😀" with ASCII escapes, 9 without.
                assert long.startswith(one)
                assert len(one) == pytest.approx(500 * 6 / (30 if ascii_only else 9), abs=5)
                assert three == "\\" * 250
    monkeypatch.setattr(characters, "CHUNK", 100)
    assert "more than 4,000 characters" in refused(tmp_path / "a.json", json.dumps([{"text": "x", "y": [*range(3000)]}]))
    assert "line of more than" in refused(tmp_path / "a.csv", "text\n" + "x" * 9000)


def test_documents_are_cut_at_what_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 300_000 + "\n" + f"y\n{documents.SEPARATOR}\nz")
    assert [len(text) for text in read(tmp_path / "a.txt", longest=1000)] == [1000, 1]


def test_a_file_is_read_no_further_than_asked(tmp_path: Path) -> None:
    """Gigabytes of one line, packed to a megabyte: the first document comes at once."""
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as stream:
        for _ in range(128):
            stream.write(b"bomb" * (1 << 18))
    found = documents.documents(tmp_path / "a.txt.gz", longest=10_000)
    assert len(next(found)) == 10_000


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id;text\n1;a\n2;"b;\nc"\n3\n')
    texts, notes = told(path)
    assert texts == ["a", "b;\nc"]
    assert "1 row without text" in notes
    path.write_text("text\n" + '"' + "x" * 200_000 + '"\n')  # longer than the csv module's own limit
    before = csv.field_size_limit()
    assert read(path) == ["x" * 200_000]
    assert csv.field_size_limit() == before
    assert "'id', 'body'" in refused(path, "id,body\n1,x")
    assert "line 3" in refused(path, 'id,text\n1,"x"\n2,"y" z\n')
    assert "line 3" in refused(path, 'id,text\n1,"never\nclosed')
    path.write_text("")
    assert read(path) == []


def test_columns_that_are_no_text_are_refused_by_type(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    for column, words in ((pyarrow.array([1]), "int64"), (pyarrow.array([["a"]]), "list<"), (pyarrow.array([b"a"]), "binary")):
        parquet.write_table(pyarrow.table({"text": column}), path)
        with pytest.raises(CalibrationError, match=f"'text' holds {words}.*--text-field"):
            read(path)
    for value, words in ((1, "a number"), (True, "true or false"), (["a"], "a list"), ({"a": 1}, "an object")):
        assert words in refused(tmp_path / "a.jsonl", json.dumps({"text": value}))
    for column in (
        ["a", None, "b"],
        pyarrow.array(["a", None, "b"]).dictionary_encode(),
        pyarrow.array(["a", None, "b"], "large_string"),
    ):
        parquet.write_table(pyarrow.table({"text": column}), path)
        texts, notes = told(path)
        assert texts == ["a", "b"]
        assert "1 row without text (null) left out" in notes


# Folders


def test_hidden_files_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in (
        "a.txt",
        "._a.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "__MACOSX/x/b.txt",
        "sub/.c.txt",
        "sub/d.txt.gz",
        "e.pdf",
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"packed") if name.endswith("gz") else name.encode())
    texts, notes = told(tmp_path / "data")
    assert texts == ["a.txt", "packed"]
    assert "4 hidden files left out" in notes
    assert "1 file of other kinds left out (.pdf 1)" in notes
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.txt").write_text("named itself")
    assert read(tmp_path / ".cache") == ["named itself"]


# EPUB


def test_epub_in_the_order_of_its_spine(tmp_path: Path) -> None:
    pages = {
        "b.xhtml": "<html xmlns='http://www.w3.org/1999/xhtml'><body><h1>Two</h1>\n <p title='a > b'>a &lt; b &amp;&nbsp;c"
        "<!-- <p>no</p> --><script>no</script><br/>&#x591C;</p><![CDATA[<raw>]]><ruby>漢<rt>kan</rt></ruby></body></html>",
        "a.xhtml": "<p>One</p><p>   \n</p><p>more <em>of</em>\nit</p> 1 < 2",
        "unused.xhtml": "<p>no</p>",
    }
    path = tmp_path / "a.epub"
    path.write_bytes(epub(pages, ["a", "b", "a", "css", "gone"]))
    assert read(path) == ["One\nmore of it\n1 < 2\n\nTwo\na < b &\xa0c\n夜\n<raw>漢"]
    path.write_bytes(epub({"a.xhtml": "<p>夜色</p>".encode("utf-16"), "b.xhtml": f"<p>{TRADITIONAL}</p>".encode("big5")}))
    assert read(path) == [f"夜色\n\n{TRADITIONAL}"]
    assert read(path, longest=1) == ["夜"]


def test_epub_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration import epub as module

    path = tmp_path / "a.epub"
    entities = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;"><!ENTITY e SYSTEM "file:///etc/passwd">]><p>&b;&e;</p>'
    path.write_bytes(epub({"a.xhtml": entities}))
    assert "root" not in read(path)[0]
    assert "haha" not in read(path)[0]
    monkeypatch.setattr(module, "LARGEST_BOOK", 1 << 20)
    assert "MiB" in refused(path, epub({f"{n}.xhtml": "<b></b>" * 100_000 for n in range(3)}))
    for hostile in ("<a ", "<!--", "<a b='", "<a a=", "<![CDATA[", "<svg>", "&", "</a ", "<rt>", "<p"):
        path.write_bytes(epub({"a.xhtml": hostile * (300_000 // len(hostile)), "b.xhtml": "<p>end</p>"}))
        read(path)
    began = time.process_time()
    for hostile in ("x" * 100_000, "x" + " " * 100_000, " x" * 50_000):
        assert "spine" in refused(
            path, epub({}, **{"OEBPS/content.opf": f"<package><manifest><item {hostile}/></manifest></package>"})
        )
    assert time.process_time() - began < 5
    assert "DRM" in refused(
        path,
        epub({"a.xhtml": "x"}, **{"META-INF/encryption.xml": '<enc:CipherReference URI="OEBPS/text/a.xhtml"/>'}),
    )
    assert "spine" in refused(path, epub({"a.xhtml": "x"}, ["css"]))
    assert "EPUB" in refused(path, b"x")
    path.write_bytes(epub({"a.xhtml": "&#" + "9" * 5000 + ";"}))
    with pytest.raises(CalibrationError, match="EPUB"):
        read(path)


# Anything at all


def mutations(content: bytes, chance: random.Random) -> Iterator[bytes]:
    for _ in range(25):
        flipped = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        yield bytes(flipped)
        yield content[: chance.randrange(len(content))]
        start = chance.randrange(len(content))
        yield content[:start] + content[start + chance.randrange(40) :]


@pytest.mark.parametrize("suffix", READERS)
def test_hostile_files_raise_nothing_else(tmp_path: Path, suffix: str) -> None:
    chance = random.Random(suffix)
    for end, content in packed(files()[suffix]).items():
        path = tmp_path / f"a{suffix}{end}"
        for mutated in mutations(content, chance):
            path.write_bytes(mutated)
            try:
                for text in read(path):
                    text.encode()
            except CalibrationError as error:
                message = str(error)
            else:
                continue
            assert "\n" not in message
            assert path.name in message
