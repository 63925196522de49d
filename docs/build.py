"""Build the site: python docs/build.py [FOLDER], FOLDER/site/index.html then opens in a browser.

The pages are the documents of the repository as they lie there, so that a link holds on a code host and on the site.
What they link to comes along: sources become pages of their own, pictures stay files. A warning is an error.
"""

import os
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "experiments/**/*.md")
SOURCES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml", ".txt": "text"}
LINK = re.compile(r"(?P<text>!?\[(?:[^\]\[]|\[[^\]]*\])*\])\((?P<path>[^)\s#]*)(?P<rest>(?:#[^)\s]*)?)\)")
FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,}).*?^(?P=mark)", re.MULTILINE | re.DOTALL)


def collect(pages: Path) -> list[str]:
    """Lay out the documents, and the files that they link to, below a folder.

    Returns:
        Links that lead nowhere.
    """
    waiting = sorted(chain.from_iterable(ROOT.glob(pattern) for pattern in DOCUMENTS))
    seen, broken = set(waiting), []

    def on_the_site(document: Path, link: re.Match[str]) -> str:
        """A link as it holds on the site."""
        text, path, rest = link.group("text", "path", "rest")
        if not path or ":" in path:
            return link.group()
        target = Path(os.path.normpath(document.parent / path))
        if target.is_dir():
            path, target = f"{path.rstrip('/')}/README.md", target / "README.md"
            if not target.exists():  # nothing to show: the name stays, without a link
                return text[1:-1]
        if not target.is_relative_to(ROOT) or not target.exists():
            broken.append(f"{document.relative_to(ROOT)} links to {path}, which does not exist")
            return link.group()
        if target not in seen:
            seen.add(target)
            waiting.append(target)
        return f"{text}({path}{'.md' if target.suffix in SOURCES else ''}{rest})"

    for file in waiting:  # grows meanwhile
        page = pages / file.relative_to(ROOT)
        page.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            markdown, written, end = file.read_text(encoding="utf-8"), [], 0
            for block in [*FENCE.finditer(markdown), None]:  # links are rewritten between blocks, not in them
                prose = markdown[end : block.start() if block else None]
                written.append(LINK.sub(lambda link, file=file: on_the_site(file, link), prose))
                if block:
                    written.append(block.group())
                    end = block.end()
            page.write_text("".join(written), encoding="utf-8")
        elif file.suffix in SOURCES:
            name, text = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
            block = f"``````{SOURCES[file.suffix]}\n{text}\n``````\n"
            hidden = "---\nsearch: {exclude: true}\n---\n\n"
            page.with_name(f"{page.name}.md").write_text(f"{hidden}# {name}\n\n{block}", encoding="utf-8")
        else:
            shutil.copyfile(file, page)
    return broken


def main(folder: Path) -> int:
    """Build ``folder/site`` from ``folder/pages``.

    Returns:
        The exit status: 0 if every link and anchor holds.
    """
    shutil.rmtree(folder, ignore_errors=True)
    broken = collect(folder / "pages")
    shutil.copytree(ROOT / "docs" / "assets", folder / "pages" / "docs" / "assets", dirs_exist_ok=True)
    shutil.copyfile(ROOT / "mkdocs.yml", folder / "mkdocs.yml")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "docs")])}
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"]
    status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    print(*broken, sep="\n", file=sys.stderr)
    return status or bool(broken)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "docs").resolve()))
