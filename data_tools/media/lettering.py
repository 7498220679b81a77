"""Text of any script in pictures: lines broken by their width, drawn in fonts of this machine that have its characters.

Pillow's own font knows the Latin alphabet. For the rest fontconfig is asked which font covers the characters, then the
extra `fonts` (Chinese, Japanese, Korean); what none has is drawn as an empty box, and said.
"""

import os
import subprocess
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec

from PIL import ImageDraw, ImageFont

from data_tools.errors import shown

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_NO_CHARACTER = "\U0010ffff"  # what a font draws for it, it draws for all that it lacks
_QUERIED = 24  # characters that one question to fontconfig names
_MAX_QUERIES = 32  # questions in one process: a corpus may hold any characters
_TIMEOUT = 10.0
_ELLIPSIS = " ..."
# Where there is no fontconfig: fonts that Pillow finds by name in the usual folders of the system.
_WELL_KNOWN = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "wqy-microhei.ttc",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "arial.ttf",
)
_PACKAGE = "noto_cjk_sans_otc"
_FACES, _CHINESE = ((0, "HIRAGANA"), (0, "KATAKANA"), (1, "HANGUL")), 2  # in its collection


class Lettering:
    """Letters of `size` pixels. `missing` collects the characters that no font has."""

    def __init__(self, size: int):
        self.size = size
        self.missing: set[str] = set()
        self._fonts: list[Font] = [ImageFont.load_default(size)]
        self._font_of: dict[str, Font] = {}

    def wrap(self, text: str, width: float, lines: int) -> list[str]:
        """`text` in at most so many lines of that width: broken at spaces, and anywhere in scripts that write none.
        What does not fit is cut, with an ellipsis."""
        text = "".join(character if character.isprintable() else " " for character in text)
        found: list[str] = []
        rest = " ".join(text.split())
        while rest and len(found) < lines:
            end = self._fitting(rest, width)
            if end < len(rest):
                space = rest.rfind(" ", 0, end + 1)
                end = space if space > 0 and rest[end - 1].isascii() else end
            found.append(rest[:end].rstrip())
            rest = rest[end:].lstrip()
        if rest:
            last = found[-1]
            found[-1] = last[: self._fitting(last, width, _ELLIPSIS)] + _ELLIPSIS
        return found

    def width(self, line: str) -> float:
        """Of a line, in pixels."""
        return sum(font.getlength(run) for font, run in self._runs(line))

    def draw(
        self, canvas: ImageDraw.ImageDraw, place: tuple[float, float], line: str, fill: str | tuple[int, ...] = "black"
    ) -> None:
        """Draw one line with its upper left corner at `place`."""
        x, baseline = place[0], place[1] + self.size
        for font, run in self._runs(line):
            canvas.text((x, baseline), run, fill, font, anchor="ls")
            x += font.getlength(run)

    def draw_lines(
        self,
        canvas: ImageDraw.ImageDraw,
        place: tuple[float, float],
        lines: list[str],
        fill: str | tuple[int, ...] = "black",
    ) -> None:
        """Draw lines one under the other."""
        for number, line in enumerate(lines):
            self.draw(canvas, (place[0], place[1] + number * self.line_height), line, fill)

    @property
    def line_height(self) -> int:
        """From one line to the next, in pixels."""
        return round(1.3 * self.size)

    def complaint(self) -> str | None:
        """One line for the user where characters were drawn as boxes; None where none were."""
        if not self.missing:
            return None
        some = sorted(self.missing)[:5]
        names = ", ".join(f"{shown(character)} (U+{ord(character):04X})" for character in some)
        more = f" and {len(self.missing) - len(some)} more" if len(self.missing) > len(some) else ""
        return (
            f"no font of this machine has {names}{more}: drawn as boxes; remedy: put one that has them into "
            "~/.local/share/fonts; for Chinese, Japanese and Korean: pip install 'dualstream[fonts]'"
        )

    def _fitting(self, text: str, width: float, end: str = "") -> int:
        """How many characters of `text`, at least one, go into that width, `end` behind them."""
        low, high = 1, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(text[:middle] + end) <= width else (low, middle - 1)
        return low

    def _runs(self, line: str) -> Iterator[tuple[Font, str]]:
        """The line in pieces of one font. One font for all, where there is one: it also gets their order right."""
        wanted = [character for character in line if _is_drawn(character)]
        self._look_for(wanted)
        whole = next((font for font in self._fonts if all(_has(font, character) for character in wanted)), None)
        if whole is not None:
            yield whole, line
            return
        run, current = "", self._fonts[0]
        for character in line:
            font = self._font_of.get(character, current)  # spaces and marks go with what they stand beside
            if font is not current and run:
                yield current, run
                run = ""
            run, current = run + character, font
        if run:
            yield current, run

    def _look_for(self, wanted: list[str]) -> None:
        """Find a font for each character: one of those at hand, else one that covers as many of the rest as can be."""
        for character in wanted:
            if character not in self._font_of:
                font = next((font for font in self._fonts if _has(font, character)), None)
                if font is not None:
                    self._font_of[character] = font
        lacking = [character for character in dict.fromkeys(wanted) if character not in self._font_of]
        for asked in (lacking[:_QUERIED], *([character] for character in lacking)):
            asked = [character for character in asked if character not in self._font_of]
            font = self._covering(asked) if asked else None
            if font is not None:
                self._fonts.append(font)
                self._font_of |= {character: font for character in lacking if _has(font, character)}
        for character in lacking:
            if character not in self._font_of:
                self._font_of[character] = self._fonts[0]
                self.missing.add(character)

    def _covering(self, characters: list[str]) -> Font | None:
        for path, index in _candidates("".join(sorted(characters))):
            try:
                font = ImageFont.truetype(path, self.size, index)
            except OSError:  # not there, or a font of pictures in one size
                continue
            if any(_has(font, character) for character in characters):
                return font
        return None


def _is_drawn(character: str) -> bool:
    """Whether a font has to have it: not so spaces, marks that join others, and characters without a shape."""
    return unicodedata.category(character)[0] not in "ZMC"


@lru_cache(maxsize=1 << 16)
def _has(font: Font, character: str) -> bool:
    if character.isascii():
        return True
    mask, none = font.getmask(character), font.getmask(_NO_CHARACTER)
    return mask.size != none.size or bytes(mask) != bytes(none)


@lru_cache(maxsize=_MAX_QUERIES)
def _candidates(characters: str) -> tuple[tuple[str, int], ...]:
    """(file, number of the face in it) of fonts that may have the characters."""
    if _candidates.cache_info().currsize >= _MAX_QUERIES:
        return ()
    return _of_the_system(characters) + _of_the_package(characters)


def _of_the_system(characters: str) -> tuple[tuple[str, int], ...]:
    charset = " ".join(f"{ord(character):x}" for character in characters)
    command = ["fc-match", "--format=%{file}\n%{index}\n", f"sans:charset={charset}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
        path, index = done.stdout.splitlines()[:2]
        return ((path, int(index)),)
    except (OSError, ValueError, subprocess.SubprocessError):
        return tuple((name, 0) for name in _WELL_KNOWN)


def _of_the_package(characters: str) -> tuple[tuple[str, int], ...]:
    """The face of Noto Sans CJK for the script, where the extra `fonts` is installed; nothing of it is imported."""
    found = find_spec(_PACKAGE)
    folders = found.submodule_search_locations if found else None
    names = " ".join(unicodedata.name(character, "") for character in characters)
    face = next((face for face, script in _FACES if script in names), _CHINESE)
    return tuple((os.path.join(folder, "NotoSansCJK-Regular.ttc"), face) for folder in folders or ())
