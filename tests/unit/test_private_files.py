# SPDX-License-Identifier: Apache-2.0
"""The module that owns private files: folders up to the root, links, and what stays when writing fails.

What depends on it is tested where it is used: test_library_cache.py, test_compiled.py, test_metrics.py.
"""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from heterospec_vllm.kernels import private_files
from heterospec_vllm.kernels.private_files import UnsafePath

OTHER = 12345  # an account that is neither root nor ours
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another account's files")


def test_import_is_light() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from heterospec_vllm.kernels import private_files\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new - sys.stdlib_module_names == {'heterospec_vllm'}, new"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_every_folder_made_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        private_files.make_folder(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_nothing_is_made_in_a_folder_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(UnsafePath, match=f"{tmp_path}/a: found a folder that others can write"):
        private_files.make_folder(tmp_path / "a" / "b" / "c")
    assert list((tmp_path / "a").iterdir()) == []


def test_path_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert private_files.make_folder(tmp_path / "link" / "a") == tmp_path / "real" / "a"
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(OSError):
        private_files.make_folder(tmp_path / "ring" / "a")


@as_root
def test_link_of_another_account_in_a_sticky_folder(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    (tmp_path / "ours").mkdir()
    link = tmp_path / "tmp" / "link"
    link.symlink_to(tmp_path / "ours")
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(UnsafePath, match="found a link of account 12345"):
        private_files.make_folder(link)


@as_root
def test_who_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path, account in ((ours, OTHER), (theirs, OTHER + 1)):
        path.mkdir()
        (path / "file").write_text("")
        for one in (path, path / "file"):
            os.chown(one, account, account)
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    private_files.make_folder(tmp_path)  # root's
    private_files.make_folder(ours)
    os.close(private_files.open_file(ours / "file"))
    for refused in (private_files.make_folder, lambda path: private_files.open_file(path / "file")):
        with pytest.raises(UnsafePath, match="of account 12346, allowed: account 12345's or root"):
            refused(theirs)


@as_root
def test_folders_above_that_belong_to_nobody_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may map one account only: root's folders then show the number of nobody."""
    above, own = tmp_path / "home", tmp_path / "home" / "own"
    own.mkdir(parents=True)
    os.chown(above, 65534, 65534)
    with pytest.raises(UnsafePath):
        private_files.make_folder(own)
    monkeypatch.setattr(private_files, "_unmapped_accounts", lambda: frozenset({65534}))
    private_files.make_folder(own)
    os.chown(own, 65534, 65534)
    with pytest.raises(UnsafePath, match="own: found a folder of account 65534"):
        private_files.make_folder(own)
    os.chown(own, 0, 0)
    above.chmod(0o777)
    with pytest.raises(UnsafePath, match="home: found a folder that others can write"):
        private_files.make_folder(own)


def test_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UnsafePath, match="no regular file"):
        private_files.open_file(tmp_path / "pipe")


def test_lock_file_keeps_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.lock").write_text("text")
    (tmp_path / "a.lock").chmod(0o600)
    with private_files.locked(tmp_path / "a.lock"):
        assert (tmp_path / "a.lock").read_text() == "text"


def test_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    private_files.write(tmp_path / "file", b"whole")
    with pytest.raises(ZeroDivisionError), private_files.beside(tmp_path / "file") as part:
        part.write_bytes(b"hal")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(OSError, match="found no home folder"):
        private_files.cache_dir()


def test_warning_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(private_files.logger, "warning", lambda text, *args: said.append(args[0]))
    private_files.warn_once.cache_clear()
    for text in ("a", "b", "a"):
        private_files.warn_once(text)
    assert said == ["a", "b"]
