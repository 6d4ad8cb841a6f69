"""The documentation says what is so: its commands parse, its tutorial can be carried out, its notebooks run, the tests that it names exist."""

import ast
import functools
import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import periplus
from periplus import cli
from periplus.errors import UsageError
from periplus.report import Equation, Figure, Finding, Table
from periplus.study.reporting import build_report

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
BIGGEST_PICTURE = 100_000


def name(path: Path) -> str:
    return str(path.relative_to(DOCS))


def fences(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands_of(page: Path) -> list[list[str]]:
    """The words after `periplus` of every command line that a page prints, in blocks and in the text."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in fences(page, "sh") for line in block.splitlines() if line.startswith("periplus ")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += [words for words in re.findall(r"`(periplus [^`]+)`", prose) if not re.search(r"\b[A-Z]{3,}\b", words)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


COMMANDS = [pytest.param(words, id=f"{name(page)}: {' '.join(words)}") for page in PAGES for words in commands_of(page)]


def options_of(words: list[str]) -> object:
    """What the command line makes of these words, without carrying it out."""
    command = cli.commands()[words[0]]
    rest = words[1:]
    return cli.parse(command.options(rest), rest[1:] if command.subcommands else rest, "periplus")


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_taken_by_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]):
    if words[-1] == "--help" or words == ["--version"]:
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
    else:
        assert hasattr(options_of(words), "run")


def test_a_command_that_is_no_command_would_be_found():
    with pytest.raises(UsageError):
        options_of(["sample", "runs/digits", "--number", "64"])


#: Pages that were written before their commands came.
AHEAD: set[str] = set()


def test_every_command_has_its_page_and_every_page_is_listed():
    pages = {page.stem: page for page in (DOCS / "commands").glob("*.md") if page.stem != "README"}
    assert set(cli.commands()) <= set(pages)
    assert set(pages) - set(cli.commands()) <= AHEAD, "a page of a command that is not there"
    listed = (DOCS / "commands" / "README.md").read_text(encoding="utf-8")
    for stem, page in pages.items():
        assert f"({stem}.md)" in listed
        assert stem in AHEAD or any(words[0] == stem for words in commands_of(page)), f"{name(page)} shows no command line"


# ---- what pages point at ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def defined_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def named_tests(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(tests/test_\w+\.py)::(\w+)", text)


SOURCES = [*PAGES, *NOTEBOOKS]


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_tests_that_are_named_exist(source: Path):
    for file, test in named_tests(source.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file() and test in defined_in(file), f"{name(source)} names {file}::{test}"


def test_every_formula_names_its_test():
    """On the page of the mathematics each section has formulae, and after the last of them the tests that check them."""
    for section in (DOCS / "mathematics.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        for part in re.split(r"\n### ", section):
            formula = max(part.rfind("```math"), part.rfind("$$"))
            if formula >= 0:
                assert named_tests(part[formula:]), f"no test after the formula of: {part.splitlines()[0]}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_links_lead_somewhere(source: Path):
    if source.name == "api.md":
        return
    for target in re.findall(r"\]\(([^)\s]+?)(?:\\n)?\)", source.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        place = (source.parent / path).resolve() if path else source
        assert place.exists(), f"{name(source)} links to {target}"
        assert not anchor or anchor in anchors(place), f"{name(source)} links to {target}: no such heading"


def test_readme_links_here():
    assert "(docs/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def kept_results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("page", "kept"), [(ROOT / "README.md", "study_quick"), (DOCS / "results.md", "judged_mnist")])
def test_results_tables_are_made_from_what_is_kept(page: Path, kept: str):
    spec = importlib.util.spec_from_file_location("results_table", ROOT / "benchmarks" / "results_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = kept_results(kept)
    result = found["chapters"]["2b"]["scores"] if "chapters" in found else found
    told = module.table(result, found["command"])
    assert told in page.read_text(encoding="utf-8"), f"python benchmarks/results_table.py benchmarks/results/{kept}.json writes it anew"


def test_the_example_is_small_and_its_results_can_be_told():
    assert (DOCS / "example.pdf").stat().st_size <= 3_000_000
    report = build_report(kept_results("study_quick"))
    assert [chapter.key for chapter in report.chapters] == [f"{part}{letter}" for part in "12" for letter in "abcde"]
    for chapter in report.chapters:
        kinds = [type(block) for block in chapter.blocks]
        assert kinds[-1] is Finding and {Equation, Figure, Table} <= {*kinds}, chapter.key


def test_the_python_interface_is_up_to_date():
    specification = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    assert specification and specification.loader
    make_api = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(make_api)
    page = make_api.api()
    assert page == (DOCS / "api.md").read_text(encoding="utf-8"), "run: python docs/make_api.py"
    assert all(f"`periplus.{public}`" in page for public in periplus.__all__)
    assert " at 0x" not in page


# ---- what pages say to do ----------------------------------------------------------------------------------------------------------------------

#: Options with which the test hurries through the tutorial: the commands are those of the page, with less of everything.
HURRY = {"--epochs": "2", "--seeds": "1", "--starts": "2", "--n": "2"}
LESS = {"evaluate": ["--n", "0", "--images", "100", "--likelihood-images", "5"], "compare": ["--n", "100"], "path": ["--segments", "8"]}
#: Of the second and third of these nothing is learned here that tests of their own do not tell; the first needs the network.
ELSEWHERE = {"data fetch", "study", "doctor"}


def hurried(words: list[str]) -> list[str]:
    short = [HURRY.get(before, word) for before, word in zip([""] + words, words, strict=False)]
    if words[0] in LESS:
        short = [word for k, word in enumerate(short) if word != "--n" and (k == 0 or short[k - 1] != "--n")] if words[0] != "path" else short
        short += LESS[words[0]]
    return short


def make_pictures(folder: Path) -> None:
    """A folder as the tutorial has it: sub-folders are classes; 240 digits as PNG files."""
    digits = periplus.load_data("digits")
    for k in range(240):
        path = folder / ("circle" if digits.labels[k] % 2 else "square") / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[k, 0].numpy()).save(path)


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_the_tutorial_can_be_carried_out(in_a_folder: Path, capsys: pytest.CaptureFixture[str]):
    """From the first command to the last, in order, on the digits and on a folder of pictures, and its Python with them."""
    make_pictures(in_a_folder / "my-images")
    done = []
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.M | re.S):
        if language == "python":
            exec(compile(block, "tutorial.md", "exec"), {})
            done.append("python")
            continue
        for line in block.splitlines():
            words = shlex.split(line)
            if words[0] != "periplus" or any(" ".join(words[1:]).startswith(other) for other in ELSEWHERE):
                continue
            cli.run(hurried(words[1:]))
            done.append(words[1])
    capsys.readouterr()
    assert done == ["data", "train", "sample", "train", "python", "train", "train", "evaluate", "sweep", "invert", "path", "report", "compare"]
    made = "grid.png runs/mine/evaluation.json runs/sweep/curve.svg runs/mine/inversion/inversion.png runs/mine/paths/pair-1.png runs/mine/report.pdf"
    assert all((in_a_folder / path).stat().st_size > 0 for path in [*made.split(), "compared/compare.json"])
    assert list(periplus.load_data(str(in_a_folder / "my-images")).classes) == ["circle", "square"]


# ---- notebooks ----------------------------------------------------------------------------------------------------------------------------------


def run_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str] = str) -> None:
    """Execute it with this interpreter, in an empty folder, with nobody's settings; raises where a cell does."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisInterpreter(AsyncKernelManager):
        """A kernel without a kernel specification on disk."""

        @property
        def kernel_spec(self) -> KernelSpec:
            words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=words, display_name="Python 3", language="python")

    for variable in ("XDG_CACHE_HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TMPDIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(periplus.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.source = change(cell.source)
    NotebookClient(notebook, km=ThisInterpreter(), timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every cell, in order, with what it asserts."""
    run_notebook(path, tmp_path, monkeypatch)


def test_a_notebook_that_asserts_something_false_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The half-plane's distance and no other; nothing after it is run."""
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="AssertionError"):
        run_notebook(DOCS / "notebooks" / "paths.ipynb", tmp_path, monkeypatch, lambda text: text.replace("2 * 0.5 * 0.5", "3 * 0.5 * 0.5"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebooks_are_whole_small_and_of_no_machine(path: Path):
    import nbformat

    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(cell.source.count("assert ") for cell in code) >= 5
    assert len(notebook.cells) - len(code) >= len(code) // 2, "prose between the cells"
    for cell in code:
        assert cell.execution_count, f"a cell was not executed before this was kept: {cell.source[:60]}"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert len(output.get("data", {}).get("image/png", "")) * 3 / 4 < BIGGEST_PICTURE
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|Users|work|tmp|root|var)/", text) and "WARNING" not in text
