"""What mkdocs.yml calls while it builds the site: files from outside of docs/, and the tables and plots of benchmarks/.

Pages are written so that their links work in the repository. In the site, CONTRIBUTING.md, SECURITY.md and CHANGELOG.md
are pages beside those of docs/, and other files that a page links to are copied into it.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import plot, report  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TOP_LEVEL_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
RESULTS_MARKER = "<!-- results -->"
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
_PLOT_TITLES = {
    "roofline": "Work per second of every shape, and what the memory and the tensor cores of this GPU allow",
    "time-vs-batch": "Time over the batch size",
    "time-vs-context": "Time over the number of cached tokens",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in TOP_LEVEL_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    linked = {target for page in files.documentation_pages() for target in _linked_files(page)}
    linked |= {path.relative_to(ROOT).as_posix() for path in result_files()}
    for name in sorted(linked):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in result_files():
        for name, content in draw_plots(path).items():
            files.append(File.generated(config, f"plots/{path.stem}/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    markdown = _LINK.sub(lambda link: f"]({site_link(page.file.src_uri, link[1])}{link[2] or ''})", markdown)
    if RESULTS_MARKER in markdown:
        markdown = markdown.replace(RESULTS_MARKER, "\n\n".join(describe_results(path) for path in result_files()))
    return markdown


def site_link(page: str, target: str) -> str:
    """The same link from where the page is in the site. All pages are at the top there."""
    if re.match(r"[a-z]+:", target):
        return target
    return target.removeprefix("docs/") if page in TOP_LEVEL_PAGES else target.removeprefix("../")


def _linked_files(page: File) -> set[str]:
    """The files outside of docs/ that a page of it links to, as paths from the root of the repository."""
    targets = {match[1] for match in _LINK.finditer(page.content_string)}
    names = {target.removeprefix("../") for target in targets if target.startswith("../")} - set(TOP_LEVEL_PAGES)
    return {name for name in names if (ROOT / name).is_file()}


def result_files() -> list[Path]:
    """The newest first."""
    return sorted(
        RESULTS.glob("*.json"), key=lambda path: (read_record(path).get("started", ""), path.name), reverse=True
    )


def read_record(path: Path) -> dict[str, Any]:
    """What was measured, empty where the file holds something other than timings of decodes."""
    record = json.loads(path.read_text())
    is_decode = isinstance(record, dict) and all(
        isinstance(each, dict) and {"shape", "peers"} <= set(each) for each in record.get("results") or [None]
    )
    return record if is_decode else {}


@functools.cache
def draw_plots(path: Path) -> dict[str, bytes]:
    """The plots that there is data for, by their file names."""
    record = read_record(path)
    if not record or not report.peers_in(report.read_rows(record)):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        written = plot.draw_all(record, Path(folder), "svg", lambda line: None)
        return {each.name: each.read_bytes() for each in written}


def describe_results(path: Path) -> str:
    """A section in Markdown: plots, means, the table, and what could not be measured."""
    record = read_record(path)
    name = path.relative_to(ROOT).as_posix()
    parts = [f"### {path.stem}", f"Data: [`{name}`]({name})"]
    if not record:
        return "\n\n".join(parts)
    parts.append(report.caption(record))
    parts += [f"![{_PLOT_TITLES.get(Path(each).stem, each)}](plots/{path.stem}/{each})" for each in draw_plots(path)]
    parts += [*report.summary_lines(record), report.ceiling_line(record)]
    parts.append(report.as_markdown(report.result_table(record)))
    if problems := report.problem_lines(record):
        lines = [line.rstrip() for problem in problems for line in problem.splitlines()]
        block = "\n".join(f"    {line}" for line in ["```text", *lines, "```"])
        parts.append(f'??? note "Not measured: {len(problems)}"\n\n{block}')
    return "\n\n".join(parts)
