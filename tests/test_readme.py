"""The README in its two languages: the same commands, headings, tables and pictures, paragraph by paragraph."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```.*?^```$", re.M | re.S)
HEADING = re.compile(r"^(#+) ", re.M)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parts(text: str) -> list[str]:
    """Paragraphs, lists, tables and headings without the code blocks, in their order."""
    return [part for part in re.split(r"\n\s*\n", BLOCK.sub("@", text)) if part.strip()]


def code(text: str) -> Counter[str]:
    """Inline code, wherever a line breaks and in whatever order a language puts it."""
    return Counter(" ".join(span.split()) for span in re.findall(r"`[^`]+`", text))


ENGLISH, CHINESE = read("README.md"), read("README.zh-CN.md")


def test_code_blocks_are_the_same_in_the_same_order() -> None:
    assert BLOCK.findall(ENGLISH) == BLOCK.findall(CHINESE)
    assert len(BLOCK.findall(ENGLISH)) > 10 and "```" not in BLOCK.sub("", ENGLISH + CHINESE)


def test_headings_have_the_same_levels() -> None:
    """Of each heading, and so of all; a comment in a code block is none."""
    english, chinese = (HEADING.findall(BLOCK.sub("", text)) for text in (ENGLISH, CHINESE))
    assert english == chinese and len(english) > 10


def test_every_paragraph_has_the_same_code_pictures_and_lines_of_a_table() -> None:
    english, chinese = parts(ENGLISH), parts(CHINESE)
    for ours, theirs in zip(english, chinese, strict=True):
        where = f"{ours[:100]!r} and {theirs[:100]!r}"
        assert code(ours) == code(theirs), where
        pictures = r"!\[[^]]*\]\((.*?)\)"
        assert re.findall(pictures, ours) == re.findall(pictures, theirs), where
        for line in (r"^\|", r"^- "):
            assert len(re.findall(line, ours, re.M)) == len(re.findall(line, theirs, re.M)), where


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_links_and_pictures_are_there(text: str) -> None:
    named = [name for name in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", text)) if "://" not in name]
    assert len(named) > 3 and not [name for name in named if not (ROOT / name).is_file()]


def test_each_names_the_other_at_its_top() -> None:
    assert "(README.zh-CN.md)" in ENGLISH[:200] and "(README.md)" in CHINESE[:200]
