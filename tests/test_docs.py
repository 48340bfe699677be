"""What README and docs/ tell a reader: code runs, names are there, links lead somewhere."""

import doctest
import inspect
import re
from pathlib import Path

import jax
import pytest

import rnnattn
from benchmarks import figure, history
from docs import hooks
from rnnattn.recurrent.units.lstm import LSTM

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EVERYWHERE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *PAGES]
NAME = lambda page: str(page.relative_to(ROOT))


@pytest.fixture(autouse=True)
def _as_users_run_it(only_own_checks):
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def test_the_example_of_the_readme_prints_what_it_says():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried >= 15 and not failed


def test_the_readme_has_the_speeds_of_the_committed_results():
    assert figure.table() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shade", figure.SHADES)
def test_the_figure_is_of_the_committed_results(shade, tmp_path, monkeypatch):
    monkeypatch.setattr(figure, "FIGURES", tmp_path)
    drawn = re.findall(r"<!-- (.*?) -->", figure.draw(shade).read_text())
    kept = (DOCS / "assets" / f"speed-{shade}.svg").read_text()
    assert drawn == re.findall(r"<!-- (.*?) -->", kept)  # what is written in it, letter by letter


def test_the_figure_of_releases_is_of_what_each_left(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "FIGURE", tmp_path / "history.svg")
    shapes = lambda path: re.findall(r"<!-- (.*?) -->|<path d=(.*?)>", path.read_text(), re.S)
    assert shapes(history.draw()) == shapes(DOCS / "assets" / "history.svg")


def test_a_release_is_numbers_and_points(capsys):
    with pytest.raises(SystemExit, match="2"):
        history.main(["--add", "next"])
    assert "got next" in capsys.readouterr().err


GUIDES = [page for page in PAGES if "\n```python\n" in page.read_text(encoding="utf-8")]
RUN = [
    page for page in GUIDES if page.name != "add_an_experiment.md"
]  # which has a test of its own


@pytest.mark.parametrize("page", RUN, ids=NAME)
def test_code_of_a_page_runs(page):
    if "flax" in page.read_text(encoding="utf-8"):
        pytest.importorskip("flax")
    scope: dict = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        exec(compile(block, str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_the_code_that_a_page_shows_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- source:" not in hooks.sources(text)


def test_a_function_is_shown_as_it_stands():
    shown, line = hooks.definition("rnnattn/recurrent/units/lstm.py", "LSTM.gradient")
    assert line > 1
    assert inspect.getsource(LSTM.gradient) == shown + "\n"


@pytest.mark.parametrize("page", EVERYWHERE, ids=NAME)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"`[^`]*`(?!\])", "", text)
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]*))?\)", text):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_every_public_name_has_its_place_in_the_api():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(r"^::: rnnattn\.([\w.]+)$", text, re.M))
    modules = {"interop", "masks", "reference"}
    assert set(rnnattn.__all__) - modules <= shown
    for module in (rnnattn.interop, rnnattn.masks, rnnattn.nn):
        of_module = module.__name__.removeprefix("rnnattn.")
        assert {f"{of_module}.{name}" for name in module.__all__} <= shown
    for name in shown:
        found = rnnattn
        for part in name.split("."):
            found = getattr(found, part)


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in [*PAGES, *DOCS.glob("notebooks/*.py")]:
        assert f" {page.relative_to(DOCS)}\n" in menu


def test_a_page_fetches_nothing_and_names_what_it_has():
    made = (
        '<script src="https://unpkg.com/iframe-worker/shim"></script><th></th>'
        '<div role="dialog"><a href="https://github.com" data-md-component="source">'
    )
    assert hooks.finish(made, "../assets") == (
        '<script src="../assets/worker.js"></script><td></td>'
        '<div role="dialog" aria-label="Search"><a href="https://github.com">'
    )
    assert (DOCS / "assets" / "worker.js").exists()


def test_formulas_are_typeset_and_named():
    shown = hooks.math("x^2 \\tag{L1}", "math", "formula", {}, None)
    assert (
        "<msup>" in shown and "(L1)" in shown and "\\" not in re.sub(r'aria-label=".*?"', "", shown)
    )


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_every_formula_can_be_typeset(page):
    for formula in re.findall(
        r"^```math\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        shown = hooks.math(formula, "math", "formula", {}, None)
        assert "\\" not in re.sub(r'aria-label=".*?"', "", shown)
