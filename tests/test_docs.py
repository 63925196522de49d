"""Links of the documents lead somewhere."""

import re
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "experiments/**/*.md", "alignbench/**/*.md")
DOCUMENTS = sorted(chain.from_iterable(ROOT.glob(pattern) for pattern in PATTERNS))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+\s+(.+?)\s*#*$", re.MULTILINE)


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts make them: lower case, dashes for spaces."""
    headings = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in HEADING.findall(prose(document)))
    return {heading.replace(" ", "-") for heading in headings}


def broken(document: Path) -> list[str]:
    """Links of a document to files or headings that do not exist."""
    links = [link for link in LINK.findall(prose(document)) if not re.match(r"[a-z]+:", link)]
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            missing.append(link)
    return missing


def test_the_guide_is_among_the_documents() -> None:
    assert ROOT / "CONTRIBUTING.md" in DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One heading\n")
    document = tmp_path / "page.md"
    document.write_text(
        "[a](there.md) [b](gone.md) ![c](https://example.org/x.png) [d](there.md#one-heading) [e](there.md#other)\n"
        "```\n[f](inside-a-block.md)\n```\n"
    )
    assert broken(document) == ["gone.md", "there.md#other"]
