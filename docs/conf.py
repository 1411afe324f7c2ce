"""The site: `make docs` builds it, without a network, into `docs/_build/html`."""

import os
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.images import get_image_size
from sphinx.util.osutil import relative_uri

import optax_autoscale

project = "optax_autoscale"
author = "The optax_autoscale authors"
version = release = optax_autoscale.__version__
html_title = f"{project} {version}"
# "https://github.com/OWNER/NAME", once it is known: pages then link to their sources.
repository = ""

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "pypi.md"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds a cell, for busy machines

# An IPython profile for the notebooks, so that the user's own does not affect them.
_profile = Path(__file__).parent / "_build/ipython/profile_default"
_profile.mkdir(parents=True, exist_ok=True)
(_profile / "ipython_kernel_config.py").write_text(
    'c.InlineBackend.figure_formats = {"svg"}\nc.IPKernelApp.log_level = "ERROR"\n'
)
os.environ["IPYTHONDIR"] = str(_profile.parent)

autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings describe the types; spelled out, they fill lines
# Classes of other libraries, whose documentation cannot be linked to without a network.
nitpick_ignore_regex = [("py:.*", r"(jax|optax)\..*")]

html_theme = "furo"
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
if repository:
    html_theme_options = {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
    }
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
    """Resolves links into `results`, which `docs/results` leads to, as links to its pages here."""
    root = Path(app.srcdir).parent
    for link in doctree.findall(addnodes.pending_xref):
        target = Path(link["reftarget"])
        if (link.get("reftype"), link["refdomain"]) == ("myst", "doc") and target.is_relative_to(
            root
        ):
            link["reftarget"] = target.relative_to(root).as_posix()


def _link_images(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Makes each image a link to its file, where it is shown in full size."""
    here = app.builder.get_target_uri(page)
    for image in [*doctree.findall(nodes.image)]:
        path = image["candidates"].get("*") or next(iter(image["candidates"].values()))
        file = quote(app.env.images[path][1])
        link = nodes.reference("", "", refuri=relative_uri(here, f"_images/{file}"))
        width, _ = get_image_size(Path(app.srcdir) / path) or (0, 0)
        link["classes"] += ["image", f"width-{width // 500}"]  # on a phone, wide ones are scrolled
        image.replace_self(link)
        link += image


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", _follow_links)
    app.connect("doctree-resolved", _link_images)
