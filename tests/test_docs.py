"""What the documentation shows is what the library does; Sphinx itself is not needed here.

Every fenced block of every page is run, parsed or known to be no code: a block of a kind that is not named below fails.
"""

import contextlib
import importlib
import importlib.metadata
import io
import logging
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

import penult
from penult.cli import app
from penult.data import digits
from penult.demo.networks import DigitsNet
from penult.realism import _two_sample

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
BESIDE = [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")
]
DIRECTIVE = re.compile(r"^\.\. (?:auto\w+|py:\w+):: (penult[\w.]*)", flags=re.MULTILINE)
BLOCK = re.compile(r"^(```+|:::+)([^\n`]*)\n(.*?)^\1$", flags=re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"<!-- table: ([\w-]+) -->\n.*?^Command: `([^`]+)`", flags=re.MULTILINE | re.DOTALL)

PYTHON = {"python", "py", "{code-cell} python"}
SHELL = {"sh"}
NO_CODE = {"text", "{math}", "{eval-rst}", "{toctree}", "{figure}", "{include}"}  # names of eval-rst: see below

# Training and search that a page shows at length are cut short here, so that all of its code runs in seconds.
SHORT = {
    "quickstart": {"range(30)": "range(2)"},
    "guides/bases": {"range(30)": "range(4)", "choose(head, acts)": "choose(head, acts[:400])"},
    "guides/distill": {"steps=400": "steps=8", "max_epochs=80": "max_epochs=1"},
    "guides/generate": {"max_epochs=60": "max_epochs=1", "max_epochs=150": "max_epochs=1"},
    "guides/own-base": {"samples=20_000": "samples=2_000"},
    "guides/von-mises-fisher": {"range(201)": "range(51)"},
}
# Commands that are parsed and not run, each with what runs it, and lines that are not penult's.
PARSED = {
    "penult distill": "trains for long: tests/cli/test_distill.py",
    "penult generate": "trains for long: tests/cli/test_generate.py",
    "penult draw": "needs a trained generator: tests/cli/test_generate.py",
    "penult report": "draws many figures: tests/cli/test_report.py",
    "penult demo": "trains for long: tests/demo/test_demo.py",
    "penult --devices": "several processes: tests/processes",
    "penult fit --base auto": "fits every base: tests/cli/test_extract_fit_sample.py",
}
FOREIGN = {
    "make": "a target of the Makefile",
    "pip install": "an extra of pyproject.toml",
    "python": "a script of benchmarks/ and options that it knows",
    "cp": "of what the line before made",
    "python -m venv": "the machine's own Python",
    "peers/bin/": "an environment of peers, which the project does not depend on",
}


def name_of(page):
    return str(page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT).with_suffix(""))


def blocks(page, kinds):
    return [body for _, kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind.strip() in kinds]


def found(name):
    """The object of a dotted name; a function hides a module of the same name, as it does on import."""
    module, _, last = name.rpartition(".")
    if not module:
        return importlib.import_module(name)
    parent = found(module)
    return getattr(parent, last) if hasattr(parent, last) else importlib.import_module(name)


def rooms():
    names = [name for _, name, _ in pkgutil.iter_modules(penult.__path__) if not name.startswith("_")]
    return ["penult", *(f"penult.{name}" for name in names)]


def complaints(check, values):
    """Run a check on each value, and return what failed, so that one test tells all."""
    failed = []
    for value in values:
        try:
            check(value)
        except Exception as error:  # a wrong command line raises errors of its own
            failed.append(f"{value}: {error!r}")
    return failed


# --- code that runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    out, complaints = capsys.readouterr()
    assert len(out.splitlines()) >= 5
    assert not complaints
    assert not list(tmp_path.iterdir())


def test_examples_are_short():
    assert len(EXAMPLES) >= 2
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 60 for path in EXAMPLES)


def check_every_block_is_of_a_kind_that_is_checked(page):
    text = page.read_text(encoding="utf-8")
    kinds = [kind.strip() for _, kind, _ in BLOCK.findall(text)]
    assert len(re.findall(r"^(?:```|:::)", text, flags=re.MULTILINE)) == 2 * len(kinds), "a fence inside a fence"
    for kind in kinds:
        assert kind in PYTHON | SHELL or kind.split()[0] in NO_CODE, f"nothing checks blocks of {kind!r}"
    if page in BESIDE[1:]:
        assert not PYTHON & set(kinds), "this page's Python is run by no test"
    for body in blocks(page, {"{eval-rst}"}):
        assert not re.search(r"code-block::|>>> |\w::$", body, flags=re.MULTILINE), "code that nothing runs"


def test_every_block_is_of_a_kind_that_is_checked():
    assert not complaints(check_every_block_is_of_a_kind_that_is_checked, PAGES + BESIDE)


@pytest.fixture
def as_found():
    """What the code of a page may set for a reader is afterwards as it was."""
    lightning = logging.getLogger("lightning.pytorch")
    level, environment = lightning.level, dict(os.environ)
    yield
    torch.set_printoptions(profile="default")
    lightning.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


def display(monkeypatch):
    """IPython, of which pages use `HTML` alone; it comes with the tools of the documentation only."""
    package, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    package.version_info, package.get_ipython, module.HTML = (9, 0), lambda: None, str
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)


def given():
    """What blocks marked `py` speak of without making it."""
    images = digits().images[:256]
    model = DigitsNet().eval()
    tap = penult.Tap(model, penult.find_head(model, images[:16]))
    return {"torch": torch, "penult": penult, "tap": tap, "loader": list(images.split(64))}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, PYTHON)], ids=name_of)
def test_python_of_pages_runs(page, tmp_path, monkeypatch, as_found):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_two_sample, "_STEPS", 3)
    display(monkeypatch)
    code = "\n".join(blocks(page, PYTHON))
    code = re.sub(r"^:\w+:.*\n", "", code, flags=re.MULTILINE)
    for long, short in SHORT.get(name_of(page), {}).items():
        assert long in code, f"{long} does not stand on the page any more"
        code = code.replace(long, short)
    names = {"__name__": "__main__"} | (given() if blocks(page, {"py"}) else {})
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(page), "exec"), names)


def test_the_first_page_has_code():
    (code,) = blocks(DOCS / "index.md", {"python"})
    assert "penult.find_head" in code
    assert len([line for line in code.splitlines() if line]) <= 14


# --- the command line ---------------------------------------------------------------------------------------

CONSOLE = typer.main.get_command(app)


def lines(page):
    """The lines of a page's shell blocks as lists of words, without comments and continued over backslashes."""
    for body in blocks(page, SHELL):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def parse(words):
    """Have the options of a `penult` line read as a shell would have them read, without running anything."""
    assert words[1] in CONSOLE.commands, f"there is no command penult {words[1]}"
    command = CONSOLE.commands[words[1]]
    return command, command.make_context(words[1], list(words[2:]))


def options(command):
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


def check_foreign(words):
    line = " ".join(words)
    start = max((each for each in FOREIGN if line.startswith(each)), key=len, default=None)
    assert start, f"nothing checks {line!r}; name what does in FOREIGN"
    if start == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
    elif start == "pip install":
        extras = importlib.metadata.metadata("penult").get_all("Provides-Extra")
        assert set(re.findall(r"[a-z]+", words[2].partition("[")[2])) <= set(extras), line
    elif start == "python":
        check_script(words)


def check_script(words):
    script = ROOT / words[1]
    assert script.exists(), f"{' '.join(words)}: there is no such script"
    known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    assert {word for word in words if word.startswith("--")} <= known, f"{' '.join(words)}: it has {sorted(known)}"


def check_shell_lines_of_pages_parse(page):
    for words in lines(page):
        launched = words.index("penult") if "penult" in words else None  # as torchrun -m penult, or A=1 penult
        if launched == 0 or (launched and (words[launched - 1] == "-m" or "=" in words[launched - 1])):
            parse(words[launched:])
        else:
            check_foreign(words)


def test_shell_lines_of_pages_parse():
    assert not complaints(check_shell_lines_of_pages_parse, [page for page in PAGES + BESIDE if blocks(page, SHELL)])


def check_commands_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    for inline in re.findall(r"`(penult(?: [^`\n]*)?|python benchmarks/[^`\n]*)`", BLOCK.sub("", text)):
        words = inline.split()
        if words[0] == "python":
            check_script(words)
        elif len(words) > 1 and words[1] != "COMMAND":
            assert words[1] in CONSOLE.commands, inline
            assert {w for w in words if w.startswith("--")} <= options(CONSOLE.commands[words[1]]), inline


def test_commands_in_the_text_exist():
    assert not complaints(check_commands_in_the_text_exist, PAGES + BESIDE)


def check_examples_of_help_texts_parse(command):
    examples = re.findall(r"(?<=Example: )penult .*", CONSOLE.commands[command].help)
    assert examples, "a command shows how it is used"
    for example in examples:
        for line in example.split(", then "):
            parse(shlex.split(line))


def test_examples_of_help_texts_parse():
    assert not complaints(check_examples_of_help_texts_parse, CONSOLE.commands)


MODULE = """
import torch
from torch import nn

def resnet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10)]
    return nn.Sequential(*layers)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of a user who has what the pages' commands are about, in small."""
    folder = tmp_path_factory.mktemp("user")
    for package in ("mypackage", "my"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").touch()
        (folder / package / "models.py").write_text(MODULE)
    (folder / "mynets.py").write_text(MODULE)
    names = {}
    exec(MODULE, names)
    save_file(names["resnet"]().state_dict(), folder / "resnet.safetensors")
    pixels = (255 * digits().images[:300].repeat(1, 3, 1, 1).permute(0, 2, 3, 1)).byte().numpy()
    for name, rows in {"familiar": range(250), "familiar-held-out": range(250, 280), "new": range(280, 300)}.items():
        for row in rows:
            path = folder / name / str(row % 10) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[row]).save(path)
    shutil.copytree(folder / "new", folder / "photos")
    (factory,) = (code for code in blocks(DOCS / "guides" / "your-model.md", {"python"}) if "def vit" in code)
    (folder / "mymodels.py").write_text(factory)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(patch_size=56, num_labels=10, **small)
    ViTForImageClassification(config).save_pretrained(folder / "my-checkpoint")
    parquet(folder / "train-0.parquet", pixels[:250])
    parquet(folder / "photos-0.parquet", pixels[:250])
    return folder


def parquet(path, pixels):
    encoded = []
    for each in pixels:
        buffer = io.BytesIO()
        Image.fromarray(numpy.asarray(each)).save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    labels = pyarrow.array([row % 10 for row in range(len(encoded))])
    pyarrow.parquet.write_table(pyarrow.table({"image": encoded, "label": labels}), path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(w[0] == "penult" for w in lines(p))], ids=name_of)
def test_commands_of_pages_run(page, place, monkeypatch, as_found):
    """In the order of the page, on small data; results of a command are there for the next one."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    for folder in ("activations", "acts", "drawn", "deployed"):
        shutil.rmtree(folder, ignore_errors=True)
    ran = 0
    for words in lines(page):
        if words[0] != "penult" or any(set(each.split()) <= set(words) for each in PARSED):
            continue
        if "deployed/" in words:
            shutil.copytree("activations", "deployed")
        command, context = parse(words)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), context:
            command.invoke(context)
        ran += 1
    assert ran or page.stem in ("distill", "scale"), "nothing on this page runs"


# --- names, pages and tables --------------------------------------------------------------------------------


def documented():
    names = [
        name for page in sorted((DOCS / "api").glob("*.md")) for name in DIRECTIVE.findall(page.read_text("utf-8"))
    ]
    assert len(set(names)) == len(names), "a name is documented twice"
    return names


def check_every_public_name_is_documented_once(room):
    module, names = importlib.import_module(room), documented()
    for name in module.__all__:
        value = getattr(module, name)
        there = [each for each in names if each.rpartition(".")[2] == name and found(each) is value]
        if room == "penult" and value is sys.modules.get(f"penult.{name}"):
            continue  # a room: its own names are looked for
        assert len(there) == 1, f"{room}.{name} stands in docs/api {len(there)} times: {there}"


def test_every_public_name_is_documented_once():
    assert not complaints(check_every_public_name_is_documented_once, rooms())


def test_what_is_documented_exists():
    for name in documented():
        found(name)


def test_pages_are_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in PAGES:
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            listed |= {page.parent / f"{line}.md" for line in block.splitlines() if line and not line.startswith(":")}
    assert listed == set(PAGES)


def anchors(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^\((.+)\)=$", text, flags=re.MULTILINE))


def check_links_between_pages_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    for name in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)", text):
        assert (page.parent / f"{name}.md").exists(), name


def test_links_between_pages_lead_somewhere():
    assert not complaints(check_links_between_pages_lead_somewhere, PAGES)


def test_benchmarks_lists_every_table_with_its_command():
    text = (DOCS / "benchmarks.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for page in PAGES:
        for table, command in TABLE.findall(page.read_text("utf-8")):
            linked = [row for row in rows if f"`{command}`" in row and f"({name_of(page)}.md" in row]
            assert linked, f"docs/benchmarks.md needs a row that links {name_of(page)}.md, with `{command}` ({table})"
    for result in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"benchmarks/{result.stem}.py" in text, f"docs/benchmarks.md does not name {result.stem}.py"


def test_limits_say_what_to_do_instead():
    """And each leads somewhere: to a page, an object or an option."""
    text = (DOCS / "limits.md").read_text("utf-8")
    items = re.split(r"\n- ", text)[1:]
    assert len(items) > 30
    for item in items:
        assert re.search(r"\*(?:Instead|Therefore)\b", item), item
        assert re.search(r"\]\(|`", item), item


def test_citation_and_changelog_belong_to_this_version():
    assert f"version: {penult.__version__}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert penult.__version__ in (ROOT / "CHANGELOG.md").read_text("utf-8")
