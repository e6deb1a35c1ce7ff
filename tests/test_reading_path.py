"""The five files stay small, and their reading path can be read: every name on it is defined on it or taken on trust."""
import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("train_rl", "tasks", "evaluate", "model", "train_sft")
END = "# ==== The reading path ends here. Everything below can be skipped. ===="
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
SOURCE = {name: (ROOT / f"{name}.py").read_text() for name in FILES}
TREE = {name: ast.parse(text) for name, text in SOURCE.items()}


def tokens(text):
    """The line of every token but comments and layout."""
    return [t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in LAYOUT]


def path_end(name):
    """The line at which a file's reading path ends."""
    lines = SOURCE[name].splitlines()
    assert lines.count(END) == 1, name
    return lines.index(END) + 1


def defined(name):
    """{name: line} of everything that a file defines at its top level, methods not."""
    found = {}
    for node in TREE[name].body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
        found |= {each: node.lineno for each in names}
    return found


def used(name):
    """(file, name) of everything from the five files that a file's reading path uses."""
    own, origin, modules = defined(name), {}, {}
    for node in TREE[name].body:
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            origin |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in FILES}
    found = set()
    for node in TREE[name].body:
        if node.lineno > path_end(name) or isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for each in ast.walk(node):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load):
                found |= {(name, each.id)} if each.id in own else {origin[each.id]} if each.id in origin else set()
            if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id in modules:
                found.add((modules[each.value.id], each.attr))
            if isinstance(each, ast.Constant) and each.value in own:  # an annotation in quotes
                found.add((name, each.value))
    return found


def taken_on_trust():
    """The names in README's list, in backticks, and its number of lines."""
    text = (ROOT / "README.md").read_text()
    part = re.search(r"[Tt]aken on trust[^\n]*\n+((?:[-*] .*\n)+)", text)
    return set(re.findall(r"`(\w+)`", part[1])), part[1].count("\n")


def test_every_name_on_the_reading_path_is_defined_on_it_or_taken_on_trust():
    trusted, lines = taken_on_trust()
    assert 0 < lines <= 10
    behind = {(place, each) for name in FILES for place, each in used(name) if defined(place)[each] > path_end(place)}
    assert {each for _, each in behind} <= trusted, sorted(f"{place}.{each}" for place, each in behind if each not in trusted)
    assert trusted <= {each for _, each in behind}, f"not used on the path: {trusted - {each for _, each in behind}}"


def test_a_file_uses_nothing_of_those_that_are_read_later():
    order = re.findall(r"(?m)^\d\. `(\w+)\.py`", (ROOT / "README.md").read_text())
    assert sorted(order) == sorted(FILES)
    early = {f"{name}: {place}.{each}" for name in FILES for place, each in used(name) if order.index(place) > order.index(name)}
    assert not early


@pytest.mark.parametrize("name", FILES)
def test_sections_that_comments_name_are_there(name):
    named = {int(number) for number in re.findall(r"\bsection (\d+)", SOURCE[name])}
    assert named <= {int(number) for number in re.findall(r"(?m)^# -{4,} ?(\d+)\. ", SOURCE[name])}, named


def test_the_reading_path_is_short():
    ends = {name: path_end(name) for name in FILES}
    assert sum(ends.values()) <= 1450, ends
    lengths = {name: sum(line < ends[name] for line in tokens(SOURCE[name])) for name in FILES}
    assert sum(lengths.values()) <= 12_000, lengths


def test_the_five_files_are_small():
    assert sum(len(tokens(text)) for text in SOURCE.values()) <= 57_000


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_not_dense(name):
    lines = SOURCE[name].splitlines()
    assert len(tokens(SOURCE[name])) / len(lines) <= 8.3
    assert sum(len(line) > 100 for line in lines) <= 0.02 * len(lines)
    headings = [i for i, line in enumerate(lines) if re.match(r"# -{4,} ?\d+\. ", line)] + [len(lines)]
    assert all(b - a <= 300 for a, b in zip(headings, headings[1:])) and headings[0] < 150
    for node in ast.walk(TREE[name]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.end_lineno - node.lineno < (60 if isinstance(node, ast.FunctionDef) else 240), node.name
    titles = [re.match(r"# -{4,} ?(\d+\. .*?) -*$", lines[i])[1] for i in headings[:-1]]
    contents = ast.get_docstring(TREE[name])
    assert all(re.search(rf"(^|[ ,]){re.escape(title)}\b", contents, re.MULTILINE | re.IGNORECASE) for title in titles), titles


@pytest.mark.parametrize("name", FILES)
def test_functions_that_other_files_call_are_annotated_and_documented(name):
    called = {each for other in FILES if other != name for node in TREE[other].body if isinstance(node, ast.ImportFrom)
              and node.module == name for each in (alias.name for alias in node.names)}
    for node in TREE[name].body:
        if isinstance(node, ast.FunctionDef) and node.name in called:
            arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.annotation is None]
            assert ast.get_docstring(node) and len(arguments) <= 3, f"{name}.{node.name} lacks annotations or a docstring"


def test_imports_go_in_one_direction():
    order = ("tasks", "model", "evaluate", "train_sft", "train_rl")
    for name in FILES:
        imported = {node.module for node in TREE[name].body if isinstance(node, ast.ImportFrom)} | {
            alias.name for node in TREE[name].body if isinstance(node, ast.Import) for alias in node.names}
        assert all(order.index(other) < order.index(name) for other in imported & set(order))
    assert "tasks" not in SOURCE["model"].split("\n\n\n")[0] and "import model" not in SOURCE["tasks"]


def test_no_file_but_tasks_knows_a_task_by_name():
    names = re.compile(r"GeneralPoints\(|Navigation|isinstance\([^)]*tasks\.|startswith\([\"'](gp|virl)|[\"'](gp|virl)[\"']|[\"']virl-v?l[\"']")
    for name in ("train_rl", "train_sft", "evaluate", "model"):
        code = "\n".join(line for line in SOURCE[name].splitlines() if not line.lstrip().startswith("#"))
        assert not names.search(code), (name, names.search(code))
