"""Every call whose behaviour differs between operating systems: flush, pre-allocate, lock, link, free room.

The rest of the package asks for what it needs ("these bytes survive a power cut") and finds the platform's way of
doing it here, with a fallback where the platform has none.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from luthier.errors import ArtifactError, LuthierError, RequestError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def flush_file(descriptor: int) -> None:
    """Return only when the file's bytes are on the device."""
    if sys.platform == "darwin":  # fsync leaves them in the drive's cache there
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Return only when the folder's entries (names, renames, deletions) are on the device."""
    if sys.platform == "win32":  # a folder cannot be opened there; its entries are journaled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # object-store mounts have no folders to flush
            raise
    finally:
        os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Reserve ``size`` bytes, so that a full disk shows before the first byte and not after the last."""
    if size == 0:
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def open_binary(path: Path, flags: int) -> int:
    """``os.open`` for bytes: Windows would translate line ends otherwise."""
    return os.open(path, flags | getattr(os, "O_BINARY", 0))


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; a short write goes on."""
    if not hasattr(os, "pwrite"):
        os.lseek(descriptor, offset, os.SEEK_SET)
        while data:
            data = data[os.write(descriptor, data) :]
        return
    while data:
        written = os.pwrite(descriptor, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written


def forget_cached(descriptor: int) -> None:
    """Drop the file's pages from memory, so that reading it back reads the device. A wish where unsupported."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole and flush it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        flush_file(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file at once: a reader sees the old bytes or the new ones, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_file(temporary, data)
    os.replace(temporary, path)
    flush_folder(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name without a second copy of its bytes where the file system can, else copy it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            flush_file(file.fileno())


def free_bytes(folder: Path) -> int:
    """Room on the device that holds ``folder`` or, while that doesn't exist, its nearest parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def available_memory() -> int | None:
    """Bytes of memory that could be had without swapping; None where nobody says."""
    table = Path("/proc/meminfo")
    for line in table.read_text().splitlines() if os.access(table, os.R_OK) else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):  # free pages alone: less than is available, never more
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def readable_size(size: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def no_room(error: OSError, where: Path, needed: int | None = None) -> LuthierError:
    """The error for a full disk, with how much is free and what to do."""
    need = f" and {readable_size(needed)} were needed" if needed else ""
    return LuthierError(
        f"the disk is full ({os.strerror(error.errno or errno.ENOSPC)}): {readable_size(free_bytes(where))} are free{need}.",
        code="disk-full",
        where=str(where),
        remedy="Published checkpoints are whole. Make room, then run `luthier resume` on this folder.",
    )


@contextmanager
def full_disk_named(where: Path) -> Iterator[None]:
    """Raise `no_room` where the block fails for want of room, whichever of its files it was writing."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise no_room(error, where) from None
        raise


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file while the block runs; the system lets go of it when the process ends, however it ends.

    Raises:
        RequestError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if sys.platform == "win32":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
                yield  # this file system has no locks
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise
            holder = _holder(descriptor)
            raise RequestError(
                f"{what} is in use by process {holder}.",
                code="locked",
                where=str(path.parent),
                remedy="Wait for it to end, or give this run another `output`.",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        return os.read(descriptor, 32).decode(errors="replace").strip() or "another process"
    except PermissionError:  # Windows lets nobody read what is locked
        return "another process"


def inside(folder: Path, name: str) -> Path:
    """``folder / name`` for a name read from a file, or listed in a folder that somebody else made.

    The name must be relative, without ``..``, and what it leads to, links followed, must lie in the folder. One
    exception: in a snapshot of the Hugging Face cache (``REPO/snapshots/REVISION/…``), files are links into
    ``REPO/blobs``. A folder that is a link itself is followed first.

    Raises:
        ArtifactError: the name leaves the folder.
    """
    path = folder / name
    plain = bool(name) and "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts
    if not plain or not _leads_inside(folder, path):
        raise ArtifactError(
            f"names a file outside its folder: {name!r}.",
            code="path-escape",
            where=str(folder),
            remedy="Do not open this folder; get it again from a source you trust. If you made that link yourself, put the file in its place (cp -L).",
        )
    return path


def _leads_inside(folder: Path, path: Path) -> bool:
    try:
        home = os.path.realpath(folder)
        target = os.path.realpath(path)
    except (OSError, ValueError):  # a loop of links
        return False
    if target == home or target.startswith(home.rstrip(os.sep) + os.sep):
        return True
    parts = Path(home).parts
    if "snapshots" not in parts:
        return False
    repository = Path(*parts[: len(parts) - 1 - parts[::-1].index("snapshots")])
    return Path(target).parent == repository / "blobs"
