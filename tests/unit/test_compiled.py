# SPDX-License-Identifier: Apache-2.0
"""What numba keeps on disk: read only where nobody else could have written it, and only if it is whole."""

import errno
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("numba")

from numba import config
from numba.core.caching import IndexDataCacheFile

from heterospec_vllm import compiled
from heterospec_vllm.kernels import private_files

OTHER = 12345  # an account that is neither root nor ours
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another account's files")


def _double(number: int) -> int:
    return 2 * number


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty NUMBA_CACHE_DIR."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "numba"))
    return tmp_path / "numba"


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(
        private_files.logger, "warning", lambda text, *args: found.append(text % args)
    )
    private_files.warn_once.cache_clear()
    return found


def double(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """(cache hits, cache misses) of the function as a new process compiles it; it is right."""
    monkeypatch.setattr(compiled, "_cache", compiled._Cache())
    function = compiled.compiled("int64(int64)")(_double)
    assert function(21) == 42
    return sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values())


def kept(root: Path, suffix: str) -> list[Path]:
    return list(root.rglob(f"*.{suffix}"))


def test_kept_privately_and_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    old = os.umask(0)
    try:
        assert double(monkeypatch) == (0, 1)
    finally:
        os.umask(old)
    assert double(monkeypatch) == (1, 0)
    assert str(root) == config.CACHE_DIR and warnings == []
    assert len(kept(root, "nbi")) == len(kept(root, "nbc")) == 1
    for path in (root, root / "heterospec-loops"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in root.rglob("*.*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_kept_in_the_users_cache_without_numbas_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert double(monkeypatch) == (0, 1)
    assert len(kept(tmp_path / "heterospec_vllm" / "heterospec-loops", "nbi")) == 1
    assert config.CACHE_DIR == ""


@pytest.mark.parametrize("suffix", ["nbi", "nbc", "sha256"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
        lambda path: path.unlink(),
    ],
    ids=["empty", "cut", "junk", "missing"],
)
def test_damaged_files_are_made_anew(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    suffix: str,
    damage: Callable[[Path], object],
) -> None:
    double(monkeypatch)
    for path in kept(root, suffix):
        damage(path)
    assert double(monkeypatch) == (0, 1)
    assert len(warnings) <= 1
    assert double(monkeypatch) == (1, 0)


def plant(root: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that leaves a mark when it is read, with its digest."""

    class Planted:
        def __reduce__(self):
            return (Path.touch, (mark,))

    double(monkeypatch)
    (index,) = kept(root, "nbi")
    index.write_bytes(pickle.dumps(Planted()))
    private_files.keep(index, index)


def of_another(root: Path) -> Path:
    os.chown(root, OTHER, OTHER)
    return root


def group_writable(root: Path) -> Path:
    root.chmod(0o770)
    return root


def ours_in_it_world_writable(root: Path) -> Path:
    (root / "heterospec-loops").chmod(0o777)
    return root / "heterospec-loops"


def files_of_another(root: Path) -> Path:
    for path in root.rglob("*.nb*"):
        os.chown(path, OTHER, OTHER)
    return kept(root, "nbi.sha256")[0]


def files_that_others_write(root: Path) -> Path:
    (index,) = kept(root, "nbi")
    index.chmod(0o666)
    return index


def files_behind_links(root: Path) -> Path:
    (index,) = kept(root, "nbi")
    index.rename(root / "elsewhere")
    index.symlink_to(root / "elsewhere")
    return index


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(of_another, marks=as_root),
        pytest.param(files_of_another, marks=as_root),
        group_writable,
        ours_in_it_world_writable,
        files_that_others_write,
        files_behind_links,
    ],
)
def test_planted_pickle_does_not_run(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    place: Callable[[Path], Path],
) -> None:
    mark = tmp_path / "mark"
    plant(root, mark, monkeypatch)
    named = place(root)
    for _ in range(2):
        double(monkeypatch)
    assert not mark.exists()
    assert len(warnings) == 1 and f"{named}: found" in warnings[0] and "not kept" in warnings[0]


def test_in_a_private_folder_the_planted_pickle_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what the test above keeps out is code that would have run."""
    plant(root, tmp_path / "mark", monkeypatch)
    double(monkeypatch)
    assert (tmp_path / "mark").exists()


def test_full_disk(root: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    def full(self, name: str, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_save_data", full)
        double(monkeypatch)
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert double(monkeypatch) == (0, 1), "the index without its data is not believed"


def test_other_places_that_numba_may_choose(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", "InTreeCacheLocator")
    double(monkeypatch)
    assert kept(Path(__file__).parent, "nbi") == []
    assert len(warnings) == 1 and "numba keeps nothing" in warnings[0]


RACE = """
import sys, numba
from heterospec_vllm import compiled
sys.path.insert(0, sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
from raced import double
print(double(21), sum(double.stats.cache_misses.values()))
"""


def test_processes_that_race_on_a_cold_cache(tmp_path: Path) -> None:
    (tmp_path / "raced.py").write_text(
        "from heterospec_vllm.compiled import compiled\n"
        "@compiled('int64(int64)')\ndef double(number):\n    return 2 * number\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    runs = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
    outputs = [run.communicate("go\n", timeout=60) for run in runs]
    assert sorted(out for out, _ in outputs) == ["42 0\n", "42 1\n"], outputs
