"""MkDocs hooks: equations, links out of docs/, and a check of the API reference.

MkDocs calls the functions named `on_*`. `make docs` builds in strict mode, where every warning from here is an error.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import griffe
import ziamath
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.util import ETX, STX
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import ddpm_fast  # noqa: E402  # from this folder; it imports PyTorch only where that is used
from ddpm_fast.options import options_of  # noqa: E402
from ddpm_fast.samplers import PlanOptions  # noqa: E402
from ddpm_fast.sampling.options import DrawOptions  # noqa: E402
from ddpm_fast.training.options import STRUCTS  # noqa: E402

CODE = {".py": "python"}  # files shown as pages; others are copied as they are

# Modules whose public names have to be in the API reference: those in `__all__`, else the classes and functions defined there.
PUBLIC_MODULES = (
    "ddpm_fast",
    "ddpm_fast.nn",
    "ddpm_fast.plan",
    "ddpm_fast.schedule",
    "ddpm_fast.integrations.denoising_diffusion_pytorch",
    "ddpm_fast.integrations.diffusers",
    "ddpm_fast.integrations.fuse",
    "ddpm_fast.integrations.guided_diffusion",
)
# Helpers of other modules.
INTERNAL = {"ddpm_fast.plan.checked_timesteps", "ddpm_fast.plan.spaced_timesteps", "ddpm_fast.schedule.numbered"}

log = logging.getLogger("mkdocs.hooks")


# ----------------------------------------------------------------------------------------------------------- equations


ziamath.config.precision = 2  # digits of a coordinate: pages stay small


def svg(latex: str, *, inline: bool) -> str:
    """Draw LaTeX as an SVG in the colour of the text. It needs neither a script nor a font where it is read."""
    drawn = ziamath.Latex(latex, size=17 if inline else 19, color="currentColor", inline=inline)
    style = f"vertical-align: {drawn.getyofst():.2f}px"
    return f'<span class="math" role="img" aria-label="{html.escape(latex)}" style="{style}">{drawn.svg()}</span>'


def equation(source: str, *_: Any, **__: Any) -> str:
    r"""Draw a ```math block. `\tag{3}` numbers it, and links reach it as `#eq-3`."""
    number = re.search(r"\\tag\{([^}]*)\}", source)
    drawn = svg((source.replace(number[0], "") if number else source).strip(), inline=False)
    if number is None:
        return f'<div class="equation">{drawn}</div>'
    label = html.escape(number[1])
    return f'<div class="equation" id="eq-{label}">{drawn}<span class="equation-number">({label})</span></div>'


class InlineMath(InlineProcessor):
    """`$...$` within a line of text."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[ElementTree.Element | str, int, int]:  # type: ignore[override]
        assert self.md is not None
        return self.md.htmlStash.store(svg(m[1], inline=True)), m.start(0), m.end(0)


class Underscore(InlineProcessor):
    """An underscore that stays one: in a docstring, `x_0 + x_t` is no emphasis."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]
        return f"{STX}{ord('_')}{ETX}", m.start(0), m.end(0)  # as Markdown keeps what a backslash escapes


class MathExtension(Extension):
    """Text with formulas: `$...$` is drawn, and `_` is never emphasis."""

    def extendMarkdown(self, md: Markdown) -> None:
        # Code spans have priority 190, backslash escapes 180, HTML 90, emphasis 60.
        md.inlinePatterns.register(InlineMath(r"\$(?=\S)([^$\n]+?)(?<=\S)\$", md), "inline_math", 185)
        md.inlinePatterns.register(Underscore("_", md), "underscore", 65)


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(MathExtension())
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "equation", "format": equation})
    return config


def on_page_content(html: str, page: Page, config: Any, files: Files) -> None:
    """Tell MkDocs of the equations' anchors, so that it checks links to them."""
    assert page.present_anchor_ids is not None
    page.present_anchor_ids |= set(re.findall(r'id="(eq-[^"]+)"', html))


# --------------------------------------------------------------------------------------------------- links out of docs/


def home(page: Page) -> str:
    """Return the path of a page's source, relative to the repository."""
    uri = page.file.src_uri
    return uri.removeprefix("repository/").removesuffix(".page.md") if uri.startswith("repository/") else f"docs/{uri}"


def target_in_site(path: str) -> str:
    """Return the source URI under which MkDocs knows a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" + (".page.md" if Path(path).suffix in CODE else "")


def _links(text: str) -> list[re.Match[str]]:
    return list(re.finditer(r"(\[(?:[^][]|\[[^]]*\])*\]\()([^)#\s]+)((?:#[^)\s]*)?\))", text))


def _add(files: Files, config: Any, path: str) -> None:
    """Add a file of the repository, and what it links to, to the site: source code as a page."""
    uri = target_in_site(path)
    if uri in files.src_uris or not (ROOT / path).is_file():
        return
    if Path(path).suffix in CODE:
        text = (ROOT / path).read_text(encoding="utf-8")
        content = f"# {path}\n\n````{CODE[Path(path).suffix]}\n{text}\n````\n"
        files.append(File.generated(config, uri, content=content))
        return
    files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    if path.endswith(".md"):
        _add_linked(files, config, path)


def _add_linked(files: Files, config: Any, path: str) -> None:
    for link in _links((ROOT / path).read_text(encoding="utf-8")):
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[2]))
        if "://" not in link[2] and not linked.startswith(("docs/", "..")):
            _add(files, config, linked)


def on_files(files: Files, config: Any) -> Files:
    for file in list(files.documentation_pages()):
        _add_linked(files, config, f"docs/{file.src_uri}")
    return files


def options_table() -> str:
    """Return the options of training as a table in Markdown."""
    rows = ["| option | default | meaning | a resumed run may change it |", "|---|---|---|---|"]
    for name, _, default, option in (each for struct in STRUCTS for each in options_of(struct)):
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        cells = (f"`--{name.replace('_', '-')}`", "" if default is None else shown, option.help, "yes" * option.changeable)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def arguments_table(struct: type) -> str:
    """Return the options of a call as a table in Markdown."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, _, default, option in options_of(struct):
        rows.append(f"| `{name}` | {'' if default is None else default} | {f'{option.help} {option.more}'.rstrip()} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrite links between files of the repository into links between pages of the site."""
    folder = posixpath.dirname(home(page))
    markdown = markdown.replace("<!-- options -->", options_table())
    markdown = markdown.replace("<!-- plan options -->", arguments_table(PlanOptions))
    markdown = markdown.replace("<!-- draw options -->", arguments_table(DrawOptions))
    markdown = re.sub(r"^<!-- test: .*?-->\n", "", markdown, flags=re.MULTILINE | re.DOTALL)  # for the tests

    def rewritten(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        if (ROOT / path).is_dir():
            return link[1][1:-2]  # a folder has no page: keep the text
        uri = posixpath.relpath(target_in_site(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{link[1]}{uri}{link[3]}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # code blocks are the odd ones
    for i in range(0, len(parts), 2):
        for link in reversed(_links(parts[i])):
            parts[i] = parts[i][: link.start()] + rewritten(link) + parts[i][link.end() :]
    return "".join(parts)


# -------------------------------------------------------------------------------------------------- the API's coverage


def public_names(path: str, module: griffe.Object | griffe.Alias) -> list[str]:
    """Return the public names of a module: `__all__` if it has one, else the classes and functions that it defines."""
    if path == "ddpm_fast":
        return ddpm_fast.__all__  # computed, so Griffe cannot read it
    if module.exports is not None:
        return [str(name) for name in module.exports]
    own = [member for member in module.members.values() if not member.is_alias and (member.is_class or member.is_function)]
    return [member.name for member in own if not member.name.startswith("_")]


def public_objects(package: griffe.Object | griffe.Alias) -> dict[str, griffe.Object | griffe.Alias]:
    """Return the full public names, and the object behind each."""
    found = {}
    for path in PUBLIC_MODULES:
        module = package[path.removeprefix("ddpm_fast.")] if path != "ddpm_fast" else package
        names = public_names(path, module)
        if not names:
            log.warning("%s has no public names, or the check does not find them", path)
        for name in names:
            # Griffe takes ddpm_fast.noise for the module ops/noise.py; what one imports is the function in it.
            member = module.members[name]
            found[f"{path}.{name}"] = member[name] if member.is_module else member
    return {name: member for name, member in found.items() if name not in INTERNAL}


def undocumented_members(name: str, member: griffe.Object | griffe.Alias) -> list[str]:
    """Return the public methods and properties of a class that have no docstring, and so are not on its page."""
    if not member.is_class:
        return []
    methods = [m for m in member.members.values() if m.is_function or "property" in m.labels]
    return [f"{name}.{m.name}" for m in methods if not m.name.startswith("_") and not m.has_docstring]


def on_post_build(config: Any) -> None:
    """Warn of every public name that no page of the API reference documents."""
    package = griffe.load("ddpm_fast", search_paths=[ROOT], resolve_aliases=True)
    pages = Path(config.site_dir, "api").glob("*.html")
    ids = {name for page in pages for name in re.findall(r'id="ddpm_fast\.([\w.]*)"', page.read_text(encoding="utf-8"))}
    documented = {package[name].canonical_path for name in ids}
    for name, member in public_objects(package).items():
        if member.canonical_path not in documented:
            log.warning("%s is public and is not in the API reference: add it to a page of docs/api/", name)
        if not member.has_docstring:
            log.warning("%s is public and has no docstring", name)
        for method in undocumented_members(name, member):
            log.warning("%s is public and has no docstring", method)
