"""What lies outside of docs/ on the site: README, CONTRIBUTING and CHANGELOG become pages, other files plain names."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the root of the repository."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site; one to a file that does not exist ends the build."""
    folder = ROOT if page.file.src_uri in PAGES.values() else ROOT / "docs"
    return LINK.sub(lambda link: _led(link, folder, page.file.src_uri), markdown)


def _led(link: re.Match[str], folder: Path, page: str) -> str:
    picture, text, target = link.groups()
    path, _, anchor = target.partition("#")
    if "://" in target or not path:
        return link[0]
    file = (folder / path).resolve()
    if not file.exists():
        raise PluginError(f"{page}: no such file: {target}")
    if file.parent == ROOT / "docs" or (file.name in PAGES and file.parent == ROOT):
        name = PAGES.get(file.name, file.name) if file.parent == ROOT else file.name
        return f"{picture}[{text}]({name}{'#' + anchor if anchor else ''})"
    return text  # source code, which is in the repository
