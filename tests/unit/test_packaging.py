# SPDX-License-Identifier: Apache-2.0
"""What a stranger gets: the built wheel, the installed entry points, the command line."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter outside the checkout and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from the tracked files of the checkout with what is installed."""
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() or (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to(ROOT / name)
    built = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(built), str(source)]
    subprocess.run(command, check=True)
    (path,) = built.glob("*.whl")
    return path


def test_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"heterospec_vllm/{folder}{path.relative_to(ROOT / source)}"
        for source, folder, patterns in (
            ("heterospec_vllm", "", ("**/*.py", "assets/**/*", "py.typed")),
            ("kernels", "kernels/", ("**/*.py", "csrc/*")),
            ("configs", "configs/", ("*.json", "profiles/*")),
        )
        for pattern in patterns
        for path in (ROOT / source).glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - packed == set()
    strays = {
        name for name in packed if not name.startswith(("heterospec_vllm/", "heterospec_vllm-"))
    }
    assert strays == set()


def test_wheel_is_importable_without_the_checkout(wheel: Path) -> None:
    code = (
        "import heterospec_vllm, heterospec_vllm.kernels as kernels\n"
        "from importlib.resources import files\n"
        "assert files('heterospec_vllm.configs').joinpath('heterospec.json').is_file()\n"
        "print(heterospec_vllm.__file__, kernels.__file__)"
    )
    for path in run_python(code, PYTHONPATH=str(wheel)).split():
        assert path.startswith(str(wheel)), path


def test_installed_package_maps_kernels_and_configs() -> None:
    printed = run_python("import heterospec_vllm.kernels as kernels; print(kernels.__file__)")
    assert Path(printed.strip()).parent.name == "kernels"
    config = resources.files("heterospec_vllm.configs").joinpath("heterospec.json")
    assert json.loads(config.read_text(encoding="utf-8"))["method"] == "heterospec"


def test_plugin_entry_point_loads_a_function() -> None:
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="heterospec")
    assert entry.value == "heterospec_vllm.plugin:register"
    assert callable(entry.load())


def test_cli_help_is_light_and_lists_every_command() -> None:
    printed = run_python(
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from heterospec_vllm.cli.main import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0\n"
        "print(result.output)\n"
        "names = {'torch', 'triton', 'vllm', 'transformers', 'numpy', 'openai'}\n"
        "heavy = names & set(sys.modules)\n"
        "assert not heavy, heavy",
    )
    for command in ("demo", "demo-model", "step-table", "train-head"):
        assert f" {command} " in printed


def _imports(path: Path) -> set[str]:
    """First names of everything that a file imports, inside functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_hard_dependencies_are_what_serving_and_the_command_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    optional = {"bench", "demo", "training"}  # folders whose libraries are extras
    folders = [
        path
        for path in (ROOT / "heterospec_vllm").iterdir()
        if path.name not in optional | {"configs", "kernels", "__pycache__"}
    ]
    files = [file for path in folders for file in ([path], path.rglob("*.py"))[path.is_dir()]]
    imported = set().union(*(_imports(file) for file in files if file.suffix == ".py"))
    assert named - imported == set()
    extras = project["optional-dependencies"]
    assert any(line.startswith("gguf") for line in extras["demo"])


def test_the_demo_model_loads_without_gguf() -> None:
    run_python(
        "import sys\n"
        "sys.modules['gguf'] = None\n"
        "import heterospec_vllm.demo.model_cache, heterospec_vllm.cli.main"
    )


def test_ci_runs_the_one_check_and_hooks_need_no_fetch() -> None:
    ci = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = ci["jobs"]["check"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"]["dev"]}
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/").removeprefix("git-")
        assert tool in installed, hook


def test_the_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    prose = re.sub(r"<!-- table: begin -->.*<!-- table: end -->", "", text, flags=re.DOTALL)
    assert len(re.findall(r"(?<![\w.-])\d[\d.]*", re.sub(r"\]\([^)]*\)", "", prose))) <= 15
    assert (ROOT / "docs" / "tree.png").stat().st_size < 150_000
