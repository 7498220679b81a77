"""What is a caption: the one rule of packing, verifying, previews, training and evaluation.

A `.txt` is one caption, its lines joined by a space; where a source says `captions: lines`, or lies in CLIP_benchmark's
layout, every line of it is one. A json or a table holds a text or a list of texts, which are taken as they stand.
"""

import json
import re
from pathlib import Path
from typing import Any

from data_tools.corpus.sources import SHARD_COUNT
from data_tools.media.bad import BadSampleError

MAX_TEXT = 1 << 16  # characters; a longer text is no caption and would hold up the tokenizer
MAX_TEXT_BYTES = 8 * MAX_TEXT  # of a file or member of captions; nothing of a longer one is decoded
MAX_JSON_BYTES = 1 << 24
MAX_DEPTH = 100  # of objects and lists within each other, in metadata
_LINE_END = re.compile("\r\n?|\n")


def clean(text: str) -> str:
    """Text that UTF-8 can hold: half of a surrogate pair, from JSON or a file name, becomes "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def captions_of_text(data: bytes, lines: bool = False) -> list[str]:
    """The captions of a `.txt`, stripped, without empty ones: one, or with `lines` one a line.

    Raises BadSampleError `bad_text` (no UTF-8) or `huge_text`.
    """
    found = lines_of(decode_text(data))
    return usable(found if lines else [" ".join(found)])


def lines_of(text: str) -> list[str]:
    """The lines of a text, stripped, without empty ones."""
    return [line for line in (part.strip() for part in _LINE_END.split(text)) if line]


def decode_text(data: bytes) -> str:
    """UTF-8, a byte order mark left out. Raises BadSampleError `bad_text`, or `huge_text` before it is decoded."""
    if len(data) > MAX_TEXT_BYTES:
        raise BadSampleError("huge_text", f"a text of {len(data)} bytes, at most {MAX_TEXT} characters are read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("bad_text", str(error)) from error


def as_texts(value: object) -> list[str]:
    """What a json or a table holds as captions, as a list: a text, a list of texts or nothing.

    Raises BadSampleError `bad_json` for anything else.
    """
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSampleError("bad_json", f"captions must be text or a list of texts, got {str(value)[:60]!r}")
    return texts


def usable(texts: list[str]) -> list[str]:
    """`texts` as captions: stripped, without the empty ones, in characters that UTF-8 can hold.

    Raises BadSampleError `huge_text`.
    """
    stripped = [clean(found) for text in texts if (found := text.strip())]
    longest = max(map(len, stripped), default=0)
    if longest > MAX_TEXT:
        raise BadSampleError("huge_text", f"a text of {longest} characters, at most {MAX_TEXT} are read")
    return stripped


def parse_json(data: bytes) -> Any:
    """What a json says. Raises BadSampleError `bad_json`."""
    if len(data) > MAX_JSON_BYTES:
        raise BadSampleError("bad_json", f"{len(data)} bytes, at most {MAX_JSON_BYTES} are read")
    try:
        return json.loads(data.decode("utf-8-sig") if data.startswith(b"\xef\xbb\xbf") else data)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested without end
        raise BadSampleError("bad_json", str(error)) from error


def check_depth(value: object) -> None:
    """Raise BadSampleError `bad_json` for what is nested too deep to be stored as metadata."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise BadSampleError("bad_json", f"nested more than {MAX_DEPTH} deep")
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]


def has_caption_lines(tar: str | Path) -> bool:
    """Whether a tar lies in CLIP_benchmark's layout, where lines of a `.txt` are captions: its count of shards beside
    it."""
    path = Path(tar)
    return path.is_absolute() and (path.parent / SHARD_COUNT).is_file()
