"""The documents: links lead somewhere, commands are understood, tables agree with the code, and the site builds."""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from hydra import compose, initialize_config_dir

from alignbench import assembly, schema
from tests.conftest import CONF

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "experiments/**/*.md", "alignbench/**/*.md")
DOCUMENTS = sorted(chain.from_iterable(ROOT.glob(pattern) for pattern in PATTERNS))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+\s+(.+?)\s*#*$", re.MULTILINE)
COMMAND = re.compile(r"python -m alignbench(?P<module>\.evaluate|\.gradients)?(?P<arguments>(?: .*)?)$", re.MULTILINE)
WRITTEN_BY_THE_READER = re.compile(r"=(NAME|my_sd3|advantage_weighted|colourfulness)|\.\.\.")


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


def commands(document: Path) -> Iterator[tuple[str, list[str]]]:
    """The configuration and the settings of each command that takes settings, lists of a sweep cut to their first."""
    text = "\n".join(chain(re.findall(r"`(python -m [^`]*)`", prose(document)), *blocks(document)))
    for found in COMMAND.finditer(text):
        words = shlex.split(found["arguments"], comments=True)
        settings = [word for word in words if "=" in word]
        if "-m" in words:
            settings = [re.sub(r"=([^\[,]+),.*", r"=\1", setting) for setting in settings]
        yield "evaluate" if found["module"] == ".evaluate" else "config", settings


def blocks(document: Path) -> Iterator[list[str]]:
    """The lines of each fenced block, commands in comments included."""
    for block in FENCE.finditer(document.read_text(encoding="utf-8")):
        yield [line.lstrip("# ") for line in block.group().splitlines()]


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if any(commands(path))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_are_understood(document: Path) -> None:
    for name, settings in commands(document):
        if any(WRITTEN_BY_THE_READER.search(setting) for setting in settings):
            continue
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(name, settings)
        if name == "config":
            schema.check(config)


def test_commands_are_found() -> None:
    found = list(commands(ROOT / "README.md"))
    assert ("config", ["method=flow_grpo", "reward=exact_scene", "seed=1"]) in found
    assert ("config", ["method=diffusion_nft", "seed=0"]) in found  # of the sweep
    assert any(name == "evaluate" for name, _ in found)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([], ("curve", "final")),
        (["evaluation=preview"], ("preview-curve", "preview")),
        (["experiment=tuning"], ("tuning-curve", "tuning")),
    ],
    ids=["default", "preview", "tuning"],
)
def test_the_changelog_of_protocols_has_todays(settings: list[str], names: tuple[str, str]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*settings, "device=cpu"])
    parts = assembly.assemble(config, assembly.launched(config))
    described = assembly.describe(config, parts)
    text = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| `(\w+)` \| ([\d,]+)", text, re.MULTILINE)
    for name, protocol in zip(names, (described["protocol"], described["final_protocol"]), strict=True):
        newest = next(row for row in rows if row[0] == name)
        assert newest == (name, str(protocol["version"]), protocol["hash"], f"{protocol['images']:,}")


class Page(HTMLParser):
    """What a page of the site offers and asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []  # by the browser itself, to show the page
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
        elif asked := given.get("src") or (given.get("href") if tag == "link" else None):
            self.fetched.append(asked)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built pages."""
    for name in ("zensical", "mkdocstrings_handlers", "latex2mathml"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name}: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in (folder / "site").rglob("*.html") if path.name != "404.html"}


def test_every_link_of_the_site_leads_somewhere(site: dict[Path, Page]) -> None:
    dead = []
    for path, page in site.items():
        for link in (link for link in [*page.links, *page.fetched] if not re.match(r"[a-z]+:", link)):
            where, _, anchor = unquote(link).partition("#")
            target = (path.parent / where).resolve() if where else path
            if not target.is_file() or (anchor and target in site and anchor not in site[target].ids):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def test_the_site_fetches_nothing(site: dict[Path, Page]) -> None:
    assert [asked for page in site.values() for asked in page.fetched if re.match(r"([a-z]+:)?//", asked)] == []


def test_the_site_has_every_document_and_equation(site: dict[Path, Page]) -> None:
    folder = next(path.parent for path in site if path.parent.name == "site")
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)["nav"]
    listed = set(re.findall(r"[\w/]+\.md", str(navigation)))
    for document in ROOT.glob("docs/**/*.md"):
        name = document.relative_to(ROOT).as_posix()
        assert name in listed
        equations = document.read_text(encoding="utf-8").count("```math")
        page = folder / re.sub(r"(README)?\.md$", lambda end: "index.html" if end.group(1) else ".html", name)
        assert page.read_text(encoding="utf-8").count('<div class="equation">') == equations


def test_interfaces_come_from_docstrings(site: dict[Path, Page]) -> None:
    ids = {name for page in site.values() for name in page.ids}
    assert {"alignbench.methods.method.Method.loss", "alignbench.stack.Stack.sample", "alignbench.ledger.Budget"} <= ids
