"""What a command asks of the C library's malloc."""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has malloc keep large blocks for the next ones instead of handing each back to the system, in this whole process.

    A conversion that reads from disk asks for blocks of the same few sizes again and again; when each comes anew, the
    system finds, clears and maps every page of it, which can take as long as the conversion. All threads then share the
    blocks. For programs, not for a library to decide. Does nothing where malloc is not glibc's.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for option, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1)):
            libc.mallopt(option, value)
