"""A hook of mkdocs: files of the repository outside of docs/ become pages of the site, and links between all of them
keep working. Links are relative to the file in the repository, as GitHub follows them."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# file of the repository: its place in the site
PAGES = {
    "README.md": "quick_start.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples/README.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/backbones.md": "benchmarks/backbones.md",
}
LINK = re.compile(r"""(?:(?<=\]\()|(?<=src="))(?!https?:|mailto:|#)([^)\s#"]+)(#[^)\s"]*)?(?=[)"])""")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, and whatever they or others link to: code as a page, pictures as they are."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        for match in LINK.finditer(page.content_string):
            source = target_of(page.src_uri, match[1])
            place = place_of(source)
            if files.get_file_from_path(place) is not None or not (ROOT / source).is_file():
                continue
            if place.endswith(".md"):
                language = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}.get(Path(source).suffix, "text")
                text = (ROOT / source).read_text(encoding="utf-8")
                code = f"# {source}\n\n````{language}\n{text}\n````\n"
                files.append(File.generated(config, place, content=code))
            else:
                files.append(File.generated(config, place, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository as links within the site. Links to folders become text."""

    def replace(match: re.Match[str]) -> str:
        place = place_of(target_of(page.file.src_uri, match[1]))
        if files.get_file_from_path(place) is None:
            return match[0]
        return os.path.relpath(place, os.path.dirname(page.file.src_uri) or ".") + (match[2] or "")

    def without_folders(match: re.Match[str]) -> str:
        target = target_of(page.file.src_uri, match[2].partition("#")[0])
        return match[1] if (ROOT / target).is_dir() else match[0]

    markdown = re.sub(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)", without_folders, markdown)
    return LINK.sub(replace, markdown)


def source_of(place: str) -> str:
    """The file in the repository of a page of the site."""
    return {v: k for k, v in PAGES.items()}.get(place, f"docs/{place}")


def target_of(place: str, link: str) -> str:
    """The file in the repository that a link of a page means."""
    return os.path.normpath(os.path.join(os.path.dirname(source_of(place)), link))


def place_of(source: str) -> str:
    """Where a file of the repository is in the site."""
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    if Path(source).suffix in (".png", ".jpg", ".svg"):
        return source
    return f"{source}.md"
