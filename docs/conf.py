"""
How Sphinx builds the pages: `make docs`. Nothing needs the network, neither to build them nor to read them.

The source directory is the root of the repository, so that a link from a page to a file is the same on the pages and where
the repository is browsed.
"""

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxTranslator

from sb3_dipo import __version__

project = "sb3_dipo"
author = "sb3_dipo contributors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "examples/**.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "build", "dist", "logs", "runs"]
suppress_warnings = ["toc.not_included"]  # reports in examples/results/, which other pages link to

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = True
# A name in a docstring that leads nowhere is a warning; these belong to other packages, which are not linked.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|th|nn|np|numpy|gym|gymnasium|spaces|stable_baselines3|collections|pathlib|io|typing|abc)\b.*"),
    (r"py:class", r"(?!sb3_dipo).*|sb3_dipo\.\w+\.(Self\w+|Algorithm)"),  # type variables are not documented
    (r"py:exc", r"sb3_dipo\.fast\..*"),
]

html_theme = "furo"
html_title = f"sb3_dipo {release}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_show_sphinx = False
html_extra_path = ["start"]  # leads from the root of the site to docs/index.html


def math_inline(translator: SphinxTranslator, node: nodes.math) -> None:
    """Browsers draw MathML by themselves: no script is loaded from elsewhere."""
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def math_block(translator: SphinxTranslator, node: nodes.math_block) -> None:
    equation = latex2mathml.tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="equation">{equation}</div>')
    raise nodes.SkipNode


def link_listings(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Links to modules of the package, which lead to files where the repository is browsed, lead to viewcode's listings."""
    listings = app.env._viewcode_modules  # type: ignore[attr-defined]
    for link in list(doctree.findall(download_reference)):
        module = link["reftarget"].lstrip("./").removesuffix(".py").replace("/", ".")
        if module in listings and app.builder.format == "html":
            uri = app.builder.get_relative_uri(docname, f"_modules/{module.replace('.', '/')}")
            link.replace_self(nodes.reference("", "", *link.children, refuri=uri))


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (math_inline, None), (math_block, None))
    app.connect("doctree-resolved", link_listings)
