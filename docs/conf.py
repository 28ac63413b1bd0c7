"""Sphinx: the pages of this folder, and a reference from docstrings. `make docs` writes to build/docs."""

import re

from dlm_lightning import __version__, attention, nonfinite
from dlm_lightning.conversion import Conversion
from dlm_lightning.module import Recipe

project = "dlm_lightning"
copyright = "its authors, Apache-2.0"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"dlm_lightning {version}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a report begins below the heading that it is put under
autodoc_inherit_docstrings = False  # what a class overrides is told where it comes from
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
CODE = re.compile(r"`([^`]+)`(\w?)")
TERM = re.compile(r"(?!Shapes:)[\w/<>, ]{1,40}: \S")  # what is said of, at the beginning of a line: an entry of a list


def restructured(lines):
    """A docstring as reStructuredText: lines that begin with a term are entries of a list, `x` is code, | is a bar."""
    found, entry, section, before = lines[:1], False, False, ""
    for line in lines[1:]:
        section = section or line.startswith(("Args:", "Raises:", "Returns:"))  # which napoleon reads
        if not section and TERM.match(line) and (not before or before[-1] in ".:"):
            term, rest = line.split(": ", 1)
            found += [] if entry else [""]
            found.append(f"- **{term}**: {rest}")
            entry = True
        elif entry and line.strip():
            found.append(f"  {line.strip()}")
        else:
            found.append(line)
            entry = False
        before = line.strip()
    return [CODE.sub(lambda code: f"``{code[1]}``\\ {code[2]}", line.replace("|", "\\|")) for line in found]


# autodoc shows an alias of a few values by its name, which says nothing of them
Recipe.__init__.__annotations__["nonfinite"] = str(nonfinite.Answer).removeprefix("typing.")
Conversion.__init__.__annotations__["attention"] = str(attention.Backend).removeprefix("typing.")


def setup(app):
    """Docstrings are plain text, as `help()` shows them."""

    def process(_app, _what, _name, _object, _options, lines):
        lines[:] = restructured(lines)

    def skip(_app, _what, _name, member, skipped, _options):
        return True if str(member.__doc__).startswith("Alias for field") else None  # a named tuple's, told with it

    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip)
