# SPDX-License-Identifier: Apache-2.0
"""What pages, docstrings and comments name exists: files, folders, sections, modules, links.

A name counts as ours where it has a suffix of our sources or begins with a folder of ours. Names that belong to
others, or to files that a user writes, are listed in `NOT_OURS`.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_house_rules import name_of, repository_files

from heterospec_vllm.cli.main import app

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "heterospec_vllm"

# docs/LOG.md and docs/results/ tell what was: they name files of their day. Their links have to hold all the same.
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")]
    if path != ROOT / "docs" / "LOG.md"
)
LINKED_PAGES = sorted([*PAGES, *ROOT.glob("docs/LOG.md"), *ROOT.glob("docs/results/**/*.md")])

SOURCES = {".py", ".hpp", ".cpp", ".md"}  # a bare name with such a suffix is a file of ours
NOT_OURS = {
    "flash_attn.py",  # this one and the next three are vLLM's
    "triton_attn.py",
    "spec_decode/eagle/eagle3_utils.py",
    "v1/worker/gpu/sample/gumbel.py",
    "train/trainer.py",  # of speculators
    "llama.cpp",  # a program
    "table.md",  # what `heterospec report` writes
}

PATH = re.compile(
    r"(?<![\w./*{<-])(?:[\w.-]+/)*[\w.-]*\w\.(?:py|hpp|cpp|md|yaml|toml|json|jsonl|txt|png)\b(?![\w*(])"
)
FOLDER = re.compile(r"(?<![\w./*{<-])((?:[\w.-]+/)+)(?![\w*{<.\[])")
SECTION = re.compile(r"([\w./-]+\.md)`*(?:,? section ([\d.]*\d)|, \"([^\"]+)\")")
MODULE = re.compile(r"\bheterospec_vllm(?:\.\w+)+")
ROLE = re.compile(r":(mod|func|class|meth|data):`~?([\w.]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _comments_of_python(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                yield node.body[0].lineno, docstring


def _remarks(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a file says to its reader."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _comments_of_python(text)
    elif path.suffix in (".hpp", ".cpp"):
        for number, line in enumerate(text.splitlines(), 1):
            if "//" in line and "#include" not in line:
                yield number, line.split("//", 1)[1]
    elif path.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if "#" in line:
                yield number, line.split("#", 1)[1]


def _speaking_files() -> list[Path]:
    sources = [
        path
        for path in repository_files()
        if path.suffix in {".py", ".hpp", ".cpp", ".yaml", ".toml"} or path.name == "Makefile"
        if "results" not in path.parts and not path.is_symlink()
    ]
    return [*PAGES, *sources]


def _roots(path: Path) -> list[Path]:
    """Folders that a name may start from: the file's own, the repository, the package, the kernels, the pages."""
    kernels = ROOT / "kernels"
    return [
        path.parent,
        ROOT,
        PACKAGE,
        kernels,
        kernels / "csrc",
        ROOT / "docs",
        ROOT / "docs/results",
    ]


def _exists(name: str, path: Path) -> bool:
    return any((root / name).exists() for root in _roots(path))


def _top_folders() -> set[str]:
    return {entry.name for root in (ROOT, PACKAGE) for entry in root.iterdir() if entry.is_dir()}


class _Names:
    """What exists, and which words of a text name something that does not."""

    def __init__(self) -> None:
        self.files = {path.name for path in repository_files()}
        self.folders = _top_folders()

    def missing(self, text: str, path: Path) -> Iterator[str]:
        """Names in a text that lies in the file ``path``."""
        text = re.sub(r"https?://\S+", "", text)
        for name in PATH.findall(text):
            if name in NOT_OURS or _exists(name, path):
                continue
            folder, _, rest = name.partition("/")
            is_source = Path(name).suffix in SOURCES and (rest or name not in self.files)
            if is_source or (rest and folder in self.folders):
                yield name
        for name in FOLDER.findall(text):
            if name.split("/")[0] in self.folders and not _exists(name, path):
                yield name


def test_files_and_folders_that_are_named_exist() -> None:
    names = _Names()
    missing = [
        f"{name_of(path)}:{number}: {name}"
        for path in _speaking_files()
        for number, text in _remarks(path)
        for name in names.missing(text, path)
    ]
    assert missing == []


def _headings(page: Path) -> list[str]:
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    return [line.lstrip("#").strip() for line in lines if line.startswith("#")]


def _is_section(heading: str, number: str, title: str) -> bool:
    return heading == title or bool(
        number and re.match(rf"{re.escape(number)}(?![\d.]*\d)", heading)
    )


def test_sections_that_are_named_exist() -> None:
    missing = []
    for path in _speaking_files():
        for number, text in _remarks(path):
            for name, section, title in SECTION.findall(text):
                pages = [root / name for root in _roots(path) if (root / name).is_file()]
                headings = [heading for page in pages for heading in _headings(page)]
                if not any(_is_section(heading, section, title) for heading in headings):
                    missing.append(f"{name_of(path)}:{number}: {name}, {section or title}")
    assert missing == []


def _module_fault(dotted: str) -> bool:
    """Whether no module of ours has this name, or the module says nothing of the rest."""
    first, *parts = dotted.split(".")
    at = PACKAGE
    while parts and (at / parts[0]).is_dir():
        at /= parts.pop(0)
    if parts and (at / f"{parts[0]}.py").is_file():
        at /= f"{parts.pop(0)}.py"
    else:
        at /= "__init__.py"
    return bool(parts) and not re.search(rf"\b{parts[0]}\b", at.read_text(encoding="utf-8"))


@functools.cache
def _package_text() -> str:
    files = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _is_defined(role: str, name: str) -> bool:
    if role == "mod":
        return any(PACKAGE.rglob(f"{name}.py"))
    return bool(re.search(rf"^ *(?:class |def )?{name}\b", _package_text(), re.MULTILINE))


def test_modules_that_are_named_exist() -> None:
    missing = []
    for path in _speaking_files():
        for number, text in _remarks(path):
            missing += [
                f"{name_of(path)}:{number}: {dotted}"
                for dotted in MODULE.findall(text)
                if dotted.split(".")[-1] not in ("py", "egg") and _module_fault(dotted)
            ]
            missing += [
                f"{name_of(path)}:{number}: {name}"
                for role, name in ROLE.findall(text)
                if not _is_defined(role, name.split(".")[-1])
            ]
    assert missing == []


def _anchor(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED_PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        to = page.parent / name if name else page
        if not to.exists() or (anchor and anchor not in map(_anchor, _headings(to))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("see `policy/gone.py`", ["policy/gone.py"]),
        ("the loops of gone_loops.py.", ["gone_loops.py"]),
        ("`policy/gone/` holds them", ["policy/gone/"]),
        ("`policy/base.py`, `docs/`, csrc/walk.hpp, `answers.jsonl`, `mine/prompts.txt`", []),
    ],
)
def test_the_check_finds_what_is_gone(text: str, names: list[str]) -> None:
    assert list(_Names().missing(text, ROOT / "docs" / "design.md")) == names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = {command.name for command in app.registered_commands}
    assert set(re.findall(r"(?:`|^ *)make ([a-z][a-z-]*)", text, re.MULTILINE)) - targets == set()
    assert (
        set(re.findall(r"(?:`|^ *)heterospec ([a-z][a-z-]*)", text, re.MULTILINE)) - commands
        == set()
    )
