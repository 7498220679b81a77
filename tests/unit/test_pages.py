"""The READMEs as texts: short where they sell, whole in their links, clear about what no test runs."""

from __future__ import annotations

import re

import pytest

from packing import ROOT
from pages import NOT_RUN, PAGES, blocks

_LINK = re.compile(r"\]\(([^)#]*)(#[^)]*)?\)")


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for path, anchor in _LINK.findall(text):
        if "://" in path:
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in _anchors(target.read_text()), path + anchor


def test_the_first_page_stays_short():
    assert (ROOT / "README.md").read_text().count("\n") < 200


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_or_says_why_not(page):
    for block in blocks(page):
        assert block.language in ("bash", "python", "py", "yaml", ""), f"{page}:{block.line}"  # py: see test_adding
        if not block.language:
            assert "python -m" not in block.code, f"{page}:{block.line}: a command in a block without a language"
        elif block.code.startswith(NOT_RUN):
            assert len(block.code.splitlines()[0]) > len(NOT_RUN) + 5, f"{page}:{block.line} says no reason"


def test_messages_that_a_page_explains_exist():
    page = (ROOT / "launch/README.md").read_text()
    table = re.search(r"^\| message \|.*?\n\n", page, re.MULTILINE | re.DOTALL)[0]
    rows = [line.split("|")[1] for line in table.strip().splitlines()[2:]]
    phrases = [re.sub(r" ?[\d:]{4,}", "", phrase) for row in rows for phrase in re.findall("`(.+?)`", row)]
    assert len(phrases) >= len(rows) > 5
    sources = "\n".join(
        path.read_text() for folder in ("pretrain", "data_tools") for path in (ROOT / folder).rglob("*.py")
    )
    assert not [phrase for phrase in phrases if phrase not in sources]
