"""Sphinx configuration. The build reads nothing from the network, and neither do the pages it makes."""

import hashlib
import json
import os
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math import pick_math_environment
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import penult
from penult.report.palette import DARK, LIGHT

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the guides' networks are small: a second thread gains little

project = "penult"
author = "The penult authors"
copyright = author
version = release = penult.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
pygments_style = "friendly"
pygments_dark_style = "native"

autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "extra_repr"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 600
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"penult {version}"
html_static_path = ["_static"]
html_css_files = ["palette.css", "penult.css"]
html_theme_options = {
    f"{name}_css_variables": {"color-brand-primary": colours["accent"], "color-brand-content": colours["accent"]}
    for name, colours in (("light", LIGHT), ("dark", DARK))
}
html_math_renderer = "mathml"
html_show_copyright = False
html_show_sphinx = False

logger = logging.getLogger(__name__)


def mathml(node: nodes.math | nodes.math_block) -> str:
    """MathML of a formula: browsers draw it themselves, so that a page needs no script and no font."""
    block = isinstance(node, nodes.math_block)
    tex = re.sub(r"\\([bB]igg?)(?=\s*[\[(])", r"\\\1l", node.astext())
    tex = re.sub(r"\\([bB]igg?)(?=\s*[\])])", r"\\\1r", tex)
    if block and pick_math_environment(tex).startswith("align"):
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        markup = tex2mathml(tex, as_block=block)
        # bars of a norm are as high as its letters
        markup = re.sub(r"<mo( [^>]*)?>‖", r'<mo\1 stretchy="false">‖', markup)
        markup = markup.replace("<mo>'</mo>", '<mo lspace="0em" rspace="0em">′</mo>')
        return re.sub(r"<mo>&ApplyFunction;</mo>(?!\s*<mo[^>]*>[(\[])", '<mspace width="0.17em"></mspace>', markup)
    except Exception as error:
        logger.warning("formula cannot be read: %s: %s", error, tex, location=node, type="math")
        return nodes.Text(tex).astext()


def escape_shapes(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """A star in a shape such as (*B, d) is no emphasis."""
    for i, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [re.sub(r"(?<=[(\s])\*(?=[\w.]+[,)])", r"\\*", part) for part in parts[::2]]
        lines[i] = line if line.lstrip().startswith((">>>", "...")) else "``".join(parts)


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{mathml(node)}</div>\n')
    raise nodes.SkipNode


def mark_numbers(app: Sphinx, doctree: nodes.document) -> None:
    """A cell such as 0.53 ± 0.01 is not broken over lines: a wide table scrolls."""
    for cell in doctree.findall(nodes.entry):
        text = cell.astext()
        if len(text) <= 32 and re.match(r"[-+−±≤≥<>~]?\s?[\d.]+(?![\w.-]*[a-z]{3})", text):
            cell["classes"].append("number")


def configure_kernel(app: Sphinx) -> None:
    """Run notebooks under an IPython profile of their own: no start-up files of the user, errors only on stderr."""
    folder = Path(app.doctreedir) / "ipython"
    (folder / "profile_default").mkdir(parents=True, exist_ok=True)
    settings = {"IPKernelApp": {"log_level": "ERROR"}, "HistoryManager": {"enabled": False}}
    (folder / "profile_default" / "ipython_kernel_config.json").write_text(json.dumps(settings))
    os.environ["IPYTHONDIR"] = str(folder)


def write_palette(app: Sphinx) -> None:
    """The colours of penult's figures as CSS variables, so that inline SVG follows the reader's theme."""
    light, dark = (";".join(f"--{k}:{v}" for k, v in colours.items()) for colours in (LIGHT, DARK))
    folder = Path(app.doctreedir) / "static"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "palette.css").write_text(
        f"body{{{light}}}\nbody[data-theme=dark]{{{dark}}}\n"
        f"@media (prefers-color-scheme:dark){{body:not([data-theme=light]){{{dark}}}}}\n"
    )
    app.config.html_static_path.append(str(folder))


def library_digest() -> str:
    """Changes with any file of the library, so that docstrings and outputs are never older than the code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.connect("autodoc-process-docstring", escape_shapes, priority=100)  # before napoleon
    app.connect("doctree-read", mark_numbers)
    app.connect("builder-inited", configure_kernel)
    app.connect("builder-inited", write_palette)
    app.add_config_value("library", library_digest(), "env", str)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
