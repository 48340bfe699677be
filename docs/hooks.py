"""What the site adds to its pages when `make docs` builds it.

    ```math …```                       formulas, as MathML: a browser needs no script and no network
    <!-- source: FILE NAME [NAME …] -->   functions or classes, as they stand in the repository
    links to files outside of docs/    lead to the repository
    what the theme would fetch         comes from this folder, or not at all; what it leaves
                                       without a name for screen readers gets one

and pages that lie elsewhere in the repository, where whoever reads the source looks for them.
"""

import ast
import posixpath
import re
from html import escape
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_SOURCE = re.compile(r"^<!-- source: (\S+) ([\w. ]+?) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")


def math(source, language, css_class, options, md, **kwargs):
    """A fence of LaTeX as MathML, which names the formula to who cannot see it."""
    numbered = re.sub(r"\\tag\{(.*?)\}", r"\\qquad\\quad\\text{(\1)}", source.strip())
    label = escape(" ".join(source.split()), quote=True)
    formula = convert(numbered, display="block")
    return f'<div class="formula" role="math" aria-label="{label}">{formula}</div>'


def definition(file, name):
    """The lines of a function, class or method of a file, and where they begin."""
    text = (ROOT / file).read_text(encoding="utf-8")
    body = ast.parse(text).body
    for part in name.split("."):
        (node,) = (n for n in body if getattr(n, "name", None) == part)
        body = getattr(node, "body", [])
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(text.split("\n")[first - 1 : node.end_lineno]), first


def sources(markdown):
    """The page with the code that its marks name."""

    def code(mark):
        file, names = mark[1], mark[2].split()
        found = [definition(file, name) for name in names]
        shown = "\n\n\n".join(text for text, _ in found)
        return f'```python title="{file}"\n{shown}\n```'

    return _SOURCE.sub(code, markdown)


def on_files(files, config):
    from mkdocs.structure.files import File  # the tests of this file do without

    for name, path in ELSEWHERE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    place = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {path: name for name, path in ELSEWHERE.items()}
    pages |= {f"docs/{file.src_uri}": file.src_uri for file in files}

    def link(match):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), match[1]))
        if target in pages:
            here = posixpath.dirname(page.file.src_uri)
            return posixpath.relpath(pages[target], here or ".") + (match[2] or "")
        if not (ROOT / target).exists():
            return match[0]  # which mkdocs finds to lead nowhere
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{target}{match[2] or ''}"

    return _LINK.sub(link, sources(markdown))


def finish(html, assets):
    """A page as the theme made it, without what it would fetch and with the names it lacks."""
    for made, wanted in [
        # the script that searches without a server; assets is where those of the site are
        ("https://unpkg.com/iframe-worker/shim", f"{assets}/worker.js"),
        # stars and forks, asked of the repository's host
        (' data-md-component="source"', ""),
        ('role="dialog">', 'role="dialog" aria-label="Search">'),
        ("<th></th>", "<td></td>"),
    ]:
        html = html.replace(made, wanted)
    return html


def on_post_page(output, page, config):
    return finish(output, posixpath.relpath("assets", posixpath.dirname(page.url) or "."))


def on_post_template(output, template_name, config):
    return finish(output, "/assets") if template_name.endswith(".html") else output
