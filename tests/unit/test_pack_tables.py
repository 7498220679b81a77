"""Table files row by row: what csv and pyarrow read, and each quote that would merge rows an error with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re

import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.pack.delimited import Dialect
from data_tools.pack.records import read_records

WANTED = ("image", "caption")
CSV, NONE, MULTILINE = Dialect(True), Dialect(False), Dialect(True, multiline=True)


def read(path, data: str | bytes, dialect=None):
    """(records, notes) of a file with this content."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    notes: list[str] = []
    return list(read_records(path, dialect or Dialect(), WANTED, notes)), notes


def captions(records) -> list[str]:
    return [record.values["caption"] for record in records if not record.fault]


def thousand(bad: dict[int, str], separator=",") -> str:
    """Rows on lines 2 to 1001; `bad` replaces captions by the line."""
    lines = [f"{n}.jpg{separator}{bad.get(n, f'caption of {n}')}" for n in range(2, 1002)]
    return "\n".join([f"image{separator}caption", *lines]) + "\n"


# ---- what is legal reads as the references read it ------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab ,;\t\"'\n\r|\\\u00e9\u4e2d#="), max_size=12)
HEADER = ("image", "caption", "n")
READ = r"read (\d+) lines of t.csv: \d+ rows, (\d+) of header(?:, (\d+) further)?"


@settings(deadline=None)
@given(
    st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=6),
    st.sampled_from([",", "\t", ";", "|"]),
    st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\r\n"), (csv.QUOTE_ALL, "\n")]),
    st.sampled_from(["utf-8", "utf-8-sig"]),
)
def test_files_of_the_csv_module_come_back(tmp_path_factory, rows, delimiter, style, encoding):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=style[0], lineterminator=style[1])
    writer.writerows([HEADER, *rows])
    data = file.getvalue().encode(encoding)
    records, notes = read(tmp_path_factory.getbasetemp() / "t.csv", data, MULTILINE)
    assert [tuple(record.values.values()) for record in records] == rows
    assert not any(record.fault for record in records)
    lines, header, further = map(int, re.search(READ, notes[-1]).groups("0"))
    assert lines == header + len(rows) + further == file.getvalue().count("\n")
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(HEADER, pyarrow.string()))
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False)
    theirs = pyarrow.csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)
    assert [tuple(row.values()) for row in theirs.to_pylist()] == rows


PLAIN = st.text(st.sampled_from("ab ,;\"'\\\u00e9"), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.lists(st.tuples(PLAIN, PLAIN, PLAIN), min_size=1, max_size=6))
def test_a_tsv_is_its_lines_and_tabs(tmp_path_factory, rows):
    data = "".join("\t".join(row) + "\n" for row in [HEADER, *rows])
    records, _ = read(tmp_path_factory.getbasetemp() / "t.tsv", data)
    assert [tuple(record.values.values()) for record in records] == rows


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('a,"one\ntwo"\n', ["one\ntwo"]),
        ('a,"' + "verse\n" * 500 + '"\n', ["verse\n" * 500]),
        ('a,"a ""bare"" word, and\nanother"\n', ['a "bare" word, and\nanother']),
        ('a,5" nails\nb,"6"" nails"\n', ['5" nails', '6" nails']),
        ('a,""""\n', ['"']),
        ('a,""\nb,x\n', ["", "x"]),
        ('a,x\r\nb,"y\r\nz"\r\n', ["x", "y\r\nz"]),
        ('a,x\n\n\nb,"last"', ["x", "last"]),
    ],
)
def test_legal_fields_stay_legal(tmp_path, data, expected):
    records, _ = read(tmp_path / "t.csv", "image,caption\n" + data)
    assert (
        captions(records)
        == expected
        == [row[1] for row in csv.reader(io.StringIO(data, newline=""), strict=True) if row]
    )


def test_carriage_returns_end_lines_only_where_line_feeds_do_not(tmp_path):
    rows = [("image", "caption"), ("a.jpg", "x"), ("b.jpg", "y")]
    for name, mark in (("t.csv", ","), ("t.tsv", "\t")):
        for encoding in ("utf-8", "utf-16"):
            data = "".join(f"{mark.join(row)}\r" for row in rows).encode(encoding)
            assert captions(read(tmp_path / name, data)[0]) == ["x", "y"]
        data = f"image{mark}caption\na.jpg{mark}cut\rin two\nb.jpg{mark}y\r\n"
        records, notes = read(tmp_path / name, data)  # csv and pandas end a row there, and keep half of the caption
        assert [record.fault for record in records] == ["a carriage return within the line", None]
        assert captions(records) == ["y"]
        assert notes == [f"read 3 lines of {name}: 2 rows, 1 of header"]


# ---- quotes that would merge rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [2, 11, 999, 1001])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_quote_left_open_is_an_error_with_its_line(tmp_path, line, end):
    data = thousand({line: '"a bare quote'}).removesuffix("\n").replace("\n", end or "\n") + end
    assert len(list(csv.reader(io.StringIO(data)))) == line  # what was silently read before
    with pytest.raises(UserError, match=rf"line {line} of .*t\.csv: a double quote opens.*--quotes none.*--multiline"):
        read(tmp_path / "t.csv", data)
    records, notes = read(tmp_path / "t.csv", data, NONE)
    assert len(records) == 1000
    assert captions(records)[line - 2] == '"a bare quote'
    assert notes == ["read 1001 lines of t.csv: 1000 rows, 1 of header"]


CLOSED_LATER = {
    "at the end of a field": {10: '"bare', 510: '5" nails" long"'},
    "by an inch sign": {10: '"bare', 510: 'a nail of 5"'},
    "by another bare quote": {10: '"bare', 510: '"bare too'},
    "by a quoted field": {10: '"bare', 510: '"quoted, rightly"'},
    "two rows later": {10: '"bare', 12: 'nail of 5"'},
    "one row later": {10: '"bare', 11: 'nail of 5"'},
    "by itself": {10: '"', 11: '"'},
    "after doubled quotes": {10: '"bare', 200: 'an ""empty"" word', 510: 'nail of 5"'},
    "many times": {n: '"bare' if n % 2 else 'nail of 5"' for n in range(11, 900)},
}


@pytest.mark.parametrize("bad", CLOSED_LATER.values(), ids=CLOSED_LATER)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_a_quote_closed_rows_later_is_an_error_with_its_line(tmp_path, bad, name):
    separator = "\t" if name == "t.tsv" else ","
    data = thousand(bad, separator)
    with pytest.raises(UserError, match=rf"line {min(bad)} of .*: a double quote opens"):
        read(tmp_path / name, data, CSV)
    records, _ = read(tmp_path / "t.tsv", thousand(bad, "\t"))
    assert captions(records) == [bad.get(n, f"caption of {n}") for n in range(2, 1002)]


@pytest.mark.parametrize("name", ["caption first", "three columns", "no suffixes"])
def test_rows_are_noticed_in_any_column(tmp_path, name):
    header, row = {
        "caption first": ("caption,image", "{c},{n}.jpg"),
        "three columns": ("image,caption,split", "{n}.jpg,{c},train"),
        "no suffixes": ("image,caption", "{n},{c}"),
    }[name]
    bad = {5: '"bare', 9: 'ends in"'}
    data = "\n".join([header, *(row.format(n=n, c=bad.get(n, f"caption {n}")) for n in range(2, 20))]) + "\n"
    with pytest.raises(UserError, match=r"line 5 of"):
        read(tmp_path / "t.csv", data)


def test_multiline_says_that_such_fields_are_meant(tmp_path):
    poem = "a rose, red\na violet, blue\nand sugar, sweet"
    data = f'image,caption\na.jpg,"{poem}"\nb.jpg,next\n'
    with pytest.raises(UserError, match=r"line 2 of .*got line 4 inside of it, which looks like a row.*--multiline"):
        read(tmp_path / "t.csv", data)
    records, notes = read(tmp_path / "t.csv", data, MULTILINE)
    assert captions(records) == [poem, "next"]
    assert notes == ["read 5 lines of t.csv: 2 rows, 1 of header, 2 further lines of fields in quotes"]
    with pytest.raises(UserError, match=r"line 3 of .*with the quote still open"):
        read(tmp_path / "t.csv", 'image,caption\na.jpg,x\nb.jpg,"open\nto the end', MULTILINE)
    with pytest.raises(UserError, match=r"line 2 of .*on line 3"):
        read(tmp_path / "t.csv", 'image,caption\na.jpg,"open\nb.jpg,"closed" and more\n', MULTILINE)


def test_text_behind_a_closing_quote_is_a_bad_row(tmp_path):
    """Readers drop the quotes of such a field without a word."""
    records, _ = read(tmp_path / "t.csv", 'image,caption\na.jpg,"Hello" she said\nb.jpg,fine\n')
    assert [bool(record.fault) for record in records] == [True, False]
    assert captions(read(tmp_path / "t.csv", 'image,caption\na.jpg,"Hello" she said\n', NONE)[0]) == [
        '"Hello" she said'
    ]


@settings(deadline=None)
@given(st.text(st.sampled_from('a",\n\r'), max_size=60))
def test_lines_add_up_whatever_the_quotes(tmp_path_factory, body):
    data = "image,caption\n" + body
    name = tmp_path_factory.getbasetemp() / "t.csv"
    try:
        records, notes = read(name, data)
    except UserError:
        with pytest.raises(UserError, match=r"line \d+ of "):
            read(name, data)
        return
    numbers = [int(n) for n in re.findall(r"(\d+) (?:lines|rows|of header|further|blank)", notes[-1])]
    assert numbers[0] == sum(numbers[1:]) == len(re.findall(r"\n|[^\n]+\Z", data))
    assert numbers[1] == len(records)
    starts = [int(record.source.split(":")[1]) for record in records]
    assert starts == sorted(set(starts))


def test_a_tsv_with_quoted_fields_says_so(tmp_path):
    data = 'image\tcaption\na.jpg\t"said ""hi"""\nb.jpg\tplain\n'
    records, notes = read(tmp_path / "t.tsv", data)
    assert captions(records) == ['"said ""hi"""', "plain"]
    assert notes[-1] == "1 rows have fields in double quotes, which stay in them; --quotes csv removes them"
    assert captions(read(tmp_path / "t.tsv", data, CSV)[0]) == ['said "hi"', "plain"]


# ---- delimiters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "delimiter", "word"),
    [("t.csv", ";", "semicolons"), ("t.csv", "\t", "tabs"), ("t.csv", "|", "vertical bars"), ("t.tsv", ",", "commas"),
     ("t.tsv", ";", "semicolons"), ("t.csv", ",", None), ("t.tsv", "\t", None)],
)  # fmt: skip
def test_the_header_tells_the_delimiter(tmp_path, name, delimiter, word):
    rows = [("image", "n, and more", "caption"), ("a.jpg", "1", "x, y; z"), ("b.jpg", "2", "plain")]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)
    records, notes = read(tmp_path / name, file.getvalue(), CSV)
    assert captions(records) == ["x, y; z", "plain"]
    said = f"columns of {name} are separated by {word}"
    assert (said in notes) == (word is not None)


def test_excels_first_line_names_the_delimiter(tmp_path):
    records, _ = read(tmp_path / "t.csv", "sep=;\r\nimage;caption\r\na.jpg;x\r\n")
    assert (captions(records), records[0].source) == (["x"], "t.csv:3")


def test_spaces_around_names_and_doubled_names(tmp_path):
    assert captions(read(tmp_path / "t.csv", "image| n| caption\na.jpg| 0| A dog .\n")[0]) == [" A dog ."]
    with pytest.raises(UserError, match=r"header of .*got caption more than once"):
        read(tmp_path / "t.csv", "image,caption,caption\na.jpg,x,y\n")


# ---- encodings and damage -------------------------------------------------------------------------------------------


def test_encodings(tmp_path):
    text = "image,caption\na.jpg,caf\u00e9 \u4e2d\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert captions(read(tmp_path / "t.csv", text.encode(encoding))[0]) == ["caf\u00e9 \u4e2d"]
    for encoding in ("utf-16-le", "utf-16-be", "utf-32"):
        with pytest.raises(UserError, match="UTF-8"):
            read(tmp_path / "t.csv", text.encode(encoding))


@pytest.mark.parametrize("line", [2, 700, 1001])
def test_bytes_that_are_not_utf8_are_named_by_their_line(tmp_path, line):
    with pytest.raises(UserError, match=rf"line {line} of .*got byte 0xe9 after .*caf.*expected UTF-8.*iconv"):
        read(tmp_path / "t.csv", thousand({line: "caf\u00e9"}).encode("latin-1"))


def test_null_bytes_and_endless_lines(tmp_path):
    records, _ = read(tmp_path / "t.csv", "image,caption\na.jpg,x\0y\nb.jpg,z\n")
    assert [bool(record.fault) for record in records] == [True, False]
    for name, data in (("t.csv", "image,caption\na.jpg," + "x" * (1 << 24)), ("t.jsonl", "{" * (1 << 24))):
        with pytest.raises(UserError, match=r"line \d of .* is too long"):
            read(tmp_path / name, data)


def test_compressed_tables(tmp_path):
    table = "image,caption\na.jpg,x\n"
    files = {"t.csv.gz": table, "t.tsv.gz": table.replace(",", "\t"), "t.csv": table}
    files["t.jsonl.gz"] = '{"image": "a.jpg", "caption": "x"}\n'
    for name, data in files.items():
        assert captions(read(tmp_path / name, gzip.compress(data.encode()))[0]) == ["x"]
    whole = gzip.compress(thousand({}).encode())
    for damaged in (whole[:-20], whole[:200], whole[:100] + bytes(50) + whole[150:]):
        with pytest.raises(UserError, match=r"cannot unzip|not UTF-8|header of|cannot be read"):
            read(tmp_path / "t.csv.gz", damaged)
    with pytest.raises(UserError, match="zip archive, as Excel writes it"):
        read(tmp_path / "t.csv", b"PK\x03\x04 and more")


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def test_every_line_of_json_is_a_row_or_blank(tmp_path):
    good = json.dumps({"image": "a.jpg", "caption": 'a "quoted\nword'})
    twice = ['{"image": "a.jpg", "caption": "x", "caption": "y"}', '{"a": {"b": 1, "b": 2}}', good + good]
    others = ["[1]", "null", '"text"', good[:-1], '{"n": ' + "9" * 5000 + "}", "{'image': 1}", "[" * 10_000]
    lines = [good, "", "  ", *twice, *others]
    data = "\ufeff" + "\n".join(lines) + "\n"
    records, notes = read(tmp_path / "t.jsonl", data.encode() + b'{"image": "\xff"}\n')
    assert [record.source for record in records] == [f"t.jsonl:{n}" for n in (1, *range(4, 15))]
    assert [bool(record.fault) for record in records] == [False, *[True] * 11]
    assert captions(records) == ['a "quoted\nword']
    assert notes == ["read 14 lines of t.jsonl: 12 rows, 2 blank"]


def test_json_that_is_not_lines_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"one JSON array.*one JSON object a line"):
        read(tmp_path / "t.jsonl", json.dumps([{"image": "a.jpg"}], indent=1))
    with pytest.raises(UserError, match="UTF-16"):
        read(tmp_path / "t.jsonl", '{"image": "a.jpg"}\n'.encode("utf-16"))


# ---- whatever is in a file ------------------------------------------------------------------------------------------

PIECES = [
    "image",
    "caption",
    "a.jpg",
    ",",
    ";",
    "\t",
    '"',
    "\r",
    "\n",
    "\\",
    "\0",
    "{",
    "}",
    "[",
    "]",
    ":",
    "1",
    "\ud83d",
    "\xe9",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=40), st.sampled_from([".csv", ".tsv", ".jsonl"]), st.booleans())
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, pieces, suffix, quoted):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    data = "".join(pieces).encode("latin-1", "replace") if quoted else "".join(pieces).encode("utf-8", "surrogatepass")
    try:
        records, _ = read(path, data, Dialect(quoted))
    except UserError as error:
        refusal = str(error)
    else:
        refusal = ""
        # an empty object is a row, which names no image
        assert all(record.fault or record.values or suffix == ".jsonl" for record in records)
    assert "\n" not in refusal
    assert len(refusal) < 1300
