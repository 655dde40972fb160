"""Files appear whole or not at all, by whichever part of the package they are written."""

import errno
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

import mirage
from mirage.distributed.places import Place
from mirage.images import ImageFile, write_image
from mirage.whole_files import is_temporary, temporary_name, write_whole

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, devices and links as on POSIX")


def picture(path: Path) -> None:
    write_image(path, ImageFile(np.zeros((2, 2, 3), np.uint8), "png"))


WRITERS = {
    "whole_files": (".txt", lambda path: write_whole(path, b"new")),
    "images": (".png", picture),
    "checkpoint": (".safetensors", lambda path: mirage.save_checkpoint(mirage_of_6(), path)),
    "distributed": (".txt", lambda path: Place(str(path.parent), {}).write(str(path), b"new", "run.0")),
}


def mirage_of_6() -> mirage.MIRAGE:
    return mirage.MIRAGE(dim=6, num_blocks=(1, 1, 1, 1), heads=(1, 1, 2, 2), spd=False)


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def test_a_link_stays_a_link_to_what_is_written_in_its_own_folder(writer, tmp_path, monkeypatch):
    """In that folder, as the link may lead to another file system, where nothing can be renamed to from here."""
    suffix, write = writer
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    (there / f"real{suffix}").write_bytes(b"old")
    (here / f"link{suffix}").symlink_to(f"../there/real{suffix}")
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append((a, b)) or replace(a, b))
    write(here / f"link{suffix}")
    assert (here / f"link{suffix}").is_symlink()
    assert (there / f"real{suffix}").read_bytes() not in (b"old", b"")
    assert [(os.path.dirname(a), b) for a, b in moved] == [(str(there), str(there / f"real{suffix}"))]
    assert is_temporary(moved[0][0])
    assert [p.name for p in there.iterdir()] == [f"real{suffix}"] and len(list(here.iterdir())) == 1


@posix
def test_a_new_file_obeys_the_umask_and_an_earlier_one_keeps_its_permissions(writer, tmp_path):
    suffix, write = writer
    fresh, private, shared = (tmp_path / f"{name}{suffix}" for name in ("fresh", "private", "shared"))
    for path, mode in ((private, 0o600), (shared, 0o666)):
        path.write_bytes(b"old")
        path.chmod(mode)
    before = os.umask(0o027)
    try:
        for path in (fresh, private, shared):
            write(path)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (fresh, private, shared)] == [0o640, 0o600, 0o666]
    assert b"old" not in (private.read_bytes(), shared.read_bytes())


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(writer, failing, tmp_path, monkeypatch):
    suffix, write = writer
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_the_bytes_are_on_the_disk_before_they_get_the_name(writer, tmp_path, monkeypatch):
    suffix, write = writer
    path, calls = tmp_path / f"a{suffix}", []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("replace", b)) or replace(a, b))
    write(path)
    assert calls == [("fsync", path.stat().st_size), ("replace", str(path))]


def test_long_names_have_room_beside_the_temporary_one(writer, tmp_path):
    suffix, write = writer
    path = tmp_path / f"{'n' * (255 - len(suffix))}{suffix}"
    write(path)
    assert os.listdir(tmp_path) == [path.name]


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "absent" / "a.txt", b"new")
    assert str(caught.value) == f"[Errno 2] No such file or directory: {str(tmp_path / 'absent' / 'a.txt')!r}"
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "folder", b"new")
    assert str(caught.value) == f"[Errno 21] Is a directory: {str(tmp_path / 'folder')!r}"
    assert os.listdir(tmp_path) == ["folder"]


@posix
def test_what_is_no_regular_file_is_written_to_and_not_replaced(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    seen = []
    reader = threading.Thread(target=lambda: seen.append(fifo.read_bytes()))
    reader.start()
    write_whole(fifo, b"new")
    reader.join(10)
    assert seen == [b"new"] and stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("number, raised", [(errno.EINVAL, False), (errno.ENOSYS, False), (errno.EIO, True)])
def test_file_systems_with_nothing_to_synchronise(number, raised, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raised:
        with pytest.raises(OSError):
            write_whole(path, b"new")
    else:
        write_whole(path, b"new")
    assert path.exists() is not raised


@posix
def test_file_systems_without_permissions_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    path.chmod(0o666)

    def fail(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", fail)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_a_killed_writer_left_under_the_same_tag_is_no_hindrance(tmp_path):
    left = tmp_path / temporary_name("a.txt", "run.0")
    left.write_bytes(b"half of it, and longer than the whole")
    write_whole(tmp_path / "a.txt", b"new", tag="run.0")
    assert (tmp_path / "a.txt").read_bytes() == b"new" and not left.exists()
    assert temporary_name("a.txt") != temporary_name("a.txt"), "those without a tag differ"
    assert is_temporary(str(left)) and not is_temporary(".mirage-notes.txt") and not is_temporary("a.tmp")
