# SPDX-License-Identifier: Apache-2.0
"""Rules that keep the source readable and the repository free of private traces."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60  # of the body: a signature with shapes, or a command's options, may be long

SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".hpp", ".cu", ".toml", ".sh"}
SPDX = "SPDX-License-Identifier: Apache-2.0"
# Spelled so that this file does not find itself.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|opt|tmp|root|home)/(?=\w)")
REGISTRY_HOSTS = re.compile(
    r"\b(?:pypi|pythonhosted|download\.pytorch|npmjs|crates)\.(?:org|com|io)"
)


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    return [
        ROOT / name for name in sorted(filter(None, listed.split("\0"))) if (ROOT / name).is_file()
    ]


def source_files() -> list[Path]:
    return [path for path in repository_files() if path.suffix in SOURCE_SUFFIXES]


def text_of(path: Path) -> str | None:
    """The file's text, None for a binary file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the end."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    if not statements:
        return 0
    last = statements[-1].end_lineno
    assert last is not None
    return last - statements[0].lineno + 1


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_rules_see_the_sources() -> None:
    names = {name_of(path) for path in source_files()}
    assert {"heterospec_vllm/plugin/__init__.py", "kernels/__init__.py", "setup.py"} <= names


def test_licence_line_comes_first() -> None:
    missing = []
    for path in source_files():
        first, second = (path.read_text(encoding="utf-8").splitlines() + ["", ""])[:2]
        if SPDX not in (second if first.startswith("#!") else first):
            missing.append(name_of(path))
    assert missing == []


def test_modules_and_functions_stay_small() -> None:
    too_long = []
    for path in source_files():
        if path.suffix != ".py":
            continue
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MAX_MODULE_LINES:
            too_long.append(f"{name_of(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = body_lines(node)
                if num_lines > MAX_FUNCTION_LINES:
                    too_long.append(f"{name_of(path)}: {node.name} has {num_lines} lines")
    assert too_long == []


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["path", "host"])
def test_no_private_traces(pattern: re.Pattern[str]) -> None:
    found = [
        f"{name_of(path)}: {match.group()}"
        for path in repository_files()
        if (text := text_of(path)) is not None
        for match in pattern.finditer(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("pattern", "text", "is_trace"),
    [
        (MACHINE_PATHS, "open('/wor" + "k/shared/x')", True),
        (MACHINE_PATHS, "#!/usr/bin/env bash", False),
        (MACHINE_PATHS, "/v1/home/", False),
        (REGISTRY_HOSTS, "https://py" + "pi.org/simple", True),
        (REGISTRY_HOSTS, "the Python package index", False),
    ],
)
def test_trace_patterns_catch_what_they_name(
    pattern: re.Pattern[str], text: str, is_trace: bool
) -> None:
    assert bool(pattern.search(text)) == is_trace


def test_files_that_the_kernels_name_exist() -> None:
    """By their path in the repository, in `kernels/`, or beside the naming file; vLLM's own begin with v1/."""
    folder, missing = ROOT / "kernels", []
    for source in (*folder.rglob("*.[ch]pp"), *folder.rglob("*.py")):
        names = set(re.findall(r"[\w/]+\.(?:py|[ch]pp)\b", source.read_text(encoding="utf-8")))
        places = (source.parent, folder, folder / "cpu", folder / "csrc", ROOT)
        missing += [
            f"{name_of(source)}: {name}"
            for name in sorted(names)
            if not name.startswith("v1/") and not any((at / name).is_file() for at in places)
        ]
    assert missing == []


def test_no_blanket_exception_handlers() -> None:
    found = []
    for path in source_files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None
                or (
                    isinstance(node.type, ast.Name)
                    and node.type.id in ("Exception", "BaseException")
                )
            ):
                found.append(f"{name_of(path)}:{node.lineno}")
    assert found == []


def test_plugin_import_is_light() -> None:
    code = (
        "import sys, heterospec_vllm, heterospec_vllm.plugin\n"
        "heavy = {'torch', 'triton', 'vllm', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_kernels_never_import_vllm() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not [m for m in modules if m.split(".")[0] == "vllm"], name_of(path)
