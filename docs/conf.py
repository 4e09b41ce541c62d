"""Sphinx configuration: MyST pages, and the API reference from the docstrings.

`sphinx-build -W -b html docs docs/_build` needs no network.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the docstrings of this checkout, not of an installed version

import ivon_jax  # noqa: E402

project = "ivon_jax"
author = "the ivon_jax authors"
copyright = author
release = version = ivon_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path: list[str] = []
default_role = "py:obj"  # `ivon` in a docstring is code, and a link where it is documented
add_module_names = False

autodoc_typehints = "none"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "ivon_jax"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
html_copy_source = False

_URLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"].get("urls", {})
REPOSITORY = _URLS.get("Repository", "").rstrip("/")
if REPOSITORY:
    html_theme_options |= {"repository_url": REPOSITORY, "use_repository_button": True}


def link_to_repository(app, page, source):
    """Links to files outside docs/ lead to the repository, or to a copy while it has no address."""
    folder = Path(app.srcdir, page).parent

    def replaced(match: re.Match) -> str:
        text, target, anchor = match.groups()
        path = (folder / target).resolve()
        if path.is_relative_to(app.srcdir):
            return match[0]
        if not REPOSITORY:
            text = text.strip("`")
            return f"{{download}}`{text} <{target}>`" if path.is_file() else text
        kind = "tree" if path.is_dir() else "blob"
        return f"[{text}]({REPOSITORY}/{kind}/main/{path.relative_to(ROOT)}{anchor})"

    source[0] = re.sub(r"(?<!!)\[([^]]*)\]\((\.\./[^)#\s]+)(#[^)]*|)\)", replaced, source[0])


def mend_docstring(app, what, name, obj, options, lines):
    """Writes what the docstrings mean, where reStructuredText would read markup."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            line = line.replace("|", r"\|")  # |m| is a size, not a substitution
            line = re.sub(r"(?<=, )\*(?=\w)", r"\\*", line)  # a shape (N, *out)
            lines[i] = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line)  # the plural of `code`


def setup(app):
    """Connects the two functions above."""
    app.connect("source-read", link_to_repository)
    app.connect("autodoc-process-docstring", mend_docstring)
