"""The site: `make docs` builds it, without a network, into `docs/_build/html`."""

import os
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import optax_autoscale

project = "optax_autoscale"
author = "The optax_autoscale authors"
version = release = optax_autoscale.__version__
html_title = f"{project} {version}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell, for busy machines

# A profile of IPython for the notebooks, so that nobody's own one changes them.
_profile = Path(__file__).parent / "_build/ipython/profile_default"
_profile.mkdir(parents=True, exist_ok=True)
(_profile / "ipython_kernel_config.py").write_text(
    'c.InlineBackend.figure_formats = {"svg"}\nc.IPKernelApp.log_level = "ERROR"\n'
)
os.environ["IPYTHONDIR"] = str(_profile.parent)

autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the arguments' kinds are said in words; spelt out, they fill lines
# Classes of other libraries, to which no link leads without a network.
nitpick_ignore_regex = [("py:.*", r"(jax|optax)\..*")]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_css_files = ["site.css"]
# MathJax in one file, fonts included, so that formulas need no network.
_mathjax = files("sphinx-mathjax-offline") / "static/mathjax/tex-svg.js"
html_static_path = ["_static", str(_mathjax)]
mathjax_path = _mathjax.name
mathjax3_config = {"svg": {"scale": 0.9}}


def _follow_links(app: Sphinx, doctree: nodes.document) -> None:
    """Leads links to the pages that they mean on the site, where the path is another one.

    These are the README's, `docs/page.md`, in what a page includes, and links into `results`, whose
    real place is outside of this folder.
    """
    root = Path(app.srcdir).parent
    for link in doctree.findall(addnodes.pending_xref):
        target = link["reftarget"]
        if link.get("reftype") != "myst":
            continue
        if link["refdomain"] == "doc" and Path(target).is_relative_to(root):
            link["reftarget"] = Path(target).relative_to(root).as_posix()
        elif target.startswith("docs/"):
            page, _, part = target.removeprefix("docs/").partition("#")
            link["refdomain"], link["reftargetid"] = "doc", part or None
            link["reftarget"] = page.removesuffix(".md")


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", _follow_links)
