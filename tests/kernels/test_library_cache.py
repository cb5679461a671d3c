# SPDX-License-Identifier: Apache-2.0
"""Which cached libraries are loaded: none that another account could have written, none that is not whole."""

import _ctypes
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heterospec_vllm.kernels import private_files
from heterospec_vllm.kernels.cpu import library as cpu_library

OTHER = 12345  # an account that is neither root nor ours
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another account's files")

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
PLANTED = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void ran() { fclose(fopen(getenv("MARK"), "w")); }
extern "C" __attribute__((visibility("default"))) int answer() { return 13; }
"""


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library that compiles in no time, and no cache yet."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "kernels.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpu_library, "_SOURCE_DIR", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture(autouse=True)
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(
        private_files.logger, "warning", lambda text, *args: found.append(text % args)
    )
    private_files.warn_once.cache_clear()
    return found


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(private_files.tempfile, "tempdir", str(folder))
    return folder


def load() -> int:
    """What the library answers. It is closed, since a process opens no second file of the same name."""
    library = cpu_library._built("kernels.cpp", ["-O0"], [])
    answer = library.answer()
    _ctypes.dlclose(library._handle)
    return answer


def kept() -> Path:
    """The one library in the cache."""
    (path,) = private_files.cache_dir().glob("*.so")
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that leaves a mark when it is loaded."""
    made = tmp_path_factory.mktemp("planted") / "planted.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(made)]
    subprocess.run(command, input=PLANTED, text=True, check=True)
    return made


@pytest.fixture
def mark(tmp_path: Path, planted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the planted library in the place of ours, its digest beside it; the mark that it would leave."""
    load()
    copy = kept().with_name("copy")
    shutil.copy(planted, copy)
    private_files.keep(copy, kept())
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    return tmp_path / "mark"


def seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def test_what_is_kept_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0)
    try:
        assert load() == 42
    finally:
        os.umask(old)
    assert mode(tmp_path / "cache") == mode(private_files.cache_dir()) == 0o700
    files = list(private_files.cache_dir().iterdir())
    assert {path.suffix for path in files} == {".so", ".sha256", ".lock"}
    assert {mode(path) for path in files} == {0o600}
    content = kept().read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert seal_of(kept()).read_text() == f"{len(content)} {digest}\n"


def test_loaded_again_without_compiling(capfd: pytest.CaptureFixture[str]) -> None:
    load()
    assert "compiling" in capfd.readouterr().err
    assert load() == 42
    assert "compiling" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"not a library"),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: seal_of(path).unlink(),
        lambda path: seal_of(path).write_text(""),
        lambda path: path.unlink(),
    ],
    ids=["cut", "empty", "junk", "zeros", "no-digest", "empty-digest", "only-the-digest"],
)
def test_damaged_library_is_built_again(
    damage: Callable[[Path], object], warnings: list[str]
) -> None:
    load()
    path = kept()
    whole = path.read_bytes()
    damage(path)
    assert load() == 42
    assert kept() == path and len(path.read_bytes()) == len(whole)
    assert private_files.is_whole(path) and warnings == []


def in_world_writable(cache: Path, path: Path) -> Path:
    path.parent.chmod(0o777)
    return path.parent


def in_group_writable(cache: Path, path: Path) -> Path:
    path.parent.chmod(0o770)
    return path.parent


def in_sticky(cache: Path, path: Path) -> Path:
    path.parent.chmod(0o1777)
    return path.parent


def in_another_accounts(cache: Path, path: Path) -> Path:
    os.chown(path.parent, OTHER, OTHER)
    return path.parent


def under_another_accounts(cache: Path, path: Path) -> Path:
    os.chown(cache, OTHER, OTHER)
    return cache


def under_group_writable(cache: Path, path: Path) -> Path:
    cache.chmod(0o770)
    return cache


def behind_another_accounts_link(cache: Path, path: Path) -> Path:
    real = cache.rename(cache.with_name("real"))
    cache.symlink_to(real)
    os.chown(cache, OTHER, OTHER, follow_symlinks=False)
    return cache


def file_of_another(cache: Path, path: Path) -> Path:
    os.chown(path, OTHER, OTHER)
    return path


def digest_of_another(cache: Path, path: Path) -> Path:
    os.chown(seal_of(path), OTHER, OTHER)
    return seal_of(path)


def file_that_others_write(cache: Path, path: Path) -> Path:
    path.chmod(0o620)
    return path


def file_behind_a_link(cache: Path, path: Path) -> Path:
    path.rename(cache / "planted")
    path.symlink_to(cache / "planted")
    return path


@pytest.mark.parametrize(
    "place",
    [
        in_world_writable,
        in_group_writable,
        in_sticky,
        under_group_writable,
        file_that_others_write,
        file_behind_a_link,
        *(
            pytest.param(place, marks=as_root)
            for place in (
                in_another_accounts,
                under_another_accounts,
                behind_another_accounts_link,
                file_of_another,
                digest_of_another,
            )
        ),
    ],
)
def test_planted_library_does_not_run(
    place: Callable[[Path, Path], Path],
    tmp_path: Path,
    mark: Path,
    warnings: list[str],
    temporary: Path,
) -> None:
    named = place(tmp_path / "cache", kept())
    for _ in range(2):
        assert load() == 42
    assert not mark.exists()
    assert len(warnings) == 1 and f"{named}: found" in warnings[0] and "allowed" in warnings[0]
    assert list(temporary.iterdir()) == [], "what was built for this process alone is gone"


def test_in_a_private_folder_the_planted_library_runs(mark: Path) -> None:
    """So what the test above keeps out is code that would have run."""
    assert load() == 13 and mark.exists()


def test_own_link_and_sticky_folder_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "link").symlink_to(shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    assert load() == 42 and warnings == []
    assert kept().is_relative_to(tmp_path / "link")


@as_root
def test_roots_library_is_loaded_by_others(
    monkeypatch: pytest.MonkeyPatch, warnings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    load()
    capfd.readouterr()
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert load() == 42
    assert warnings == [] and "compiling" not in capfd.readouterr().err


def test_planted_lock_link_empties_nothing(tmp_path: Path, warnings: list[str]) -> None:
    load()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = kept().with_suffix(".lock")
    lock.unlink()
    lock.symlink_to(victim)
    kept().unlink()
    assert load() == 42
    assert victim.read_text() == "precious" and lock.is_symlink()
    assert len(warnings) == 1 and f"{lock}: found a link" in warnings[0]


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that other accounts can pass, as pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


READ_ONLY = """
import os, sys
from pathlib import Path
from heterospec_vllm.kernels.cpu import library as cpu_library
cpu_library._SOURCE_DIR = Path(sys.argv[1])
os.seteuid(int(sys.argv[2]))
assert not os.access(sys.argv[3], os.W_OK, effective_ids=True)
print(cpu_library._built("kernels.cpp", ["-O0"], []).answer())
"""


@as_root
def test_read_only_cache_that_has_the_library(
    open_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(cpu_library._SOURCE_DIR, open_place / "csrc")
    (open_place / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(open_place / "cache"))
    load()
    folder = private_files.cache_dir()
    kept().with_suffix(".lock").unlink()  # it cannot be made anew
    for path in (folder, *folder.iterdir()):
        os.chown(path, OTHER, OTHER)
    folder.chmod(0o500)
    arguments = [str(open_place / "csrc"), str(OTHER), str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, *arguments], capture_output=True, text=True
    )
    assert done.stdout == "42\n", done.stderr
    assert "compiling" not in done.stderr and "found" not in done.stderr


def test_folder_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, warnings: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", "~nobody"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))
        assert load() == 42
    assert len(warnings) == 2


def test_no_folder_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, temporary: Path, warnings: list[str]
) -> None:
    temporary.chmod(0o777)
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(cpu_library.LibraryUnavailable, match="no folder to compile .*mode 0777"):
        load()


def test_no_compiler_but_the_library_is_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load()
    for name, value in (("PATH", str(tmp_path)), ("CXX", "no-such-compiler")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert load() == 42
            with pytest.raises(cpu_library.LibraryUnavailable, match="no C\\+\\+ compiler"):
                cpu_library._built("kernels.cpp", ["-O1"], [])


RACE = """
import sys
from pathlib import Path
from heterospec_vllm.kernels.cpu import library as cpu_library
cpu_library._SOURCE_DIR = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(cpu_library._built("kernels.cpp", ["-O0"], []).answer(), flush=True)
"""


def test_processes_that_race_on_a_cold_cache_build_once(tmp_path: Path) -> None:
    (tmp_path / "cxx").write_text('#!/bin/sh\ncase "$*" in *-c*) sleep 1;; esac\nexec g++ "$@"\n')
    (tmp_path / "cxx").chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "CXX": str(tmp_path / "cxx")}
    command = [sys.executable, "-c", RACE, str(tmp_path / "csrc")]
    runs = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout is not None and run.stdout.readline() == "ready\n"
    outputs = [run.communicate("go\n", timeout=60) for run in runs]
    assert [out for out, _ in outputs] == ["42\n"] * 2, outputs
    assert sum("compiling" in err for _, err in outputs) == 1
    assert private_files.is_whole(kept())


def test_killed_build_leaves_nothing_for_long(tmp_path: Path) -> None:
    (tmp_path / "cxx").write_text(
        '#!/bin/sh\ncase "$*" in *-c*) kill -9 $PPID;; esac\nexec g++ "$@"\n'
    )
    (tmp_path / "cxx").chmod(0o755)
    environment = {**os.environ, "CXX": str(tmp_path / "cxx")}
    command = [sys.executable, "-c", RACE, str(tmp_path / "csrc")]
    killed = subprocess.run(command, env=environment, input="go\n", text=True, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(private_files.cache_dir().glob("build-*"))) == 1
    (tmp_path / "cxx").write_text('#!/bin/sh\nexec g++ "$@"\n')
    again = subprocess.run(command, env=environment, input="go\n", text=True, capture_output=True)
    assert again.stdout == "ready\n42\n"
    assert list(private_files.cache_dir().glob("build-*")) == []
