"""The documents hold true: their code runs, their links lead somewhere, their map is complete."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
# A block of Python and, if one follows at once, the block of text that it prints.
FENCE = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.M | re.S)
each_document = pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.several_devices] * (path.stem == "many-devices"))
        for path in sorted(DOCUMENTS)
    ],
    ids=lambda path: path.name,
)


def python_blocks(path):
    """For each block of Python: the lines before it, its code, and what it says that it prints."""
    text = path.read_text()
    return [(text.count("\n", 0, m.start(1)), *m.groups()) for m in FENCE.finditer(text)]


@each_document
def test_python_blocks_run_in_order_and_print_what_they_say(path, capsys):
    """All blocks of a document in one namespace. Tracebacks name the document and its line."""
    namespace = {"__name__": path.stem}
    for lines_before, code, printed in python_blocks(path):
        exec(compile("\n" * lines_before + code, str(path), "exec"), namespace)
        assert capsys.readouterr().out == (printed or ""), f"{path.name}:{lines_before}"


def test_there_are_blocks_to_run():
    with_code = {path.name for path in DOCUMENTS if python_blocks(path)}
    assert with_code >= {"README.md", "coming-from-keras.md", "masks-lengths-resets.md"}


def test_the_one_test_that_contributing_runs_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    ((path, word),) = re.findall(r"pytest (tests/\w+\.py) -k (\w+)", text)
    assert re.search(rf"^def test_\w*{word}", (ROOT / path).read_text(), re.M)


@each_document
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), target
        if heading:
            assert heading in headings(linked), target


def headings(path):
    """Anchors of a Markdown file's headings: lower case, dashes for spaces, other signs dropped."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_map_names_every_module_and_nothing_that_is_not_there():
    text = README.read_text()
    rows = text.partition("## Map")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `([^`]+)`", rows, re.M))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
    modules = {f"jaxrnn/{module.name}" for module in (ROOT / "jaxrnn").glob("*.py")}
    assert modules - named == set()
