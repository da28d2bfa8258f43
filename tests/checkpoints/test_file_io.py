"""Writing around the page cache, and in a thread."""

import errno
import gc
import os
import threading
import weakref

import numpy as np
import pytest

from portax.checkpoints.file_io import DirectFile, consume_behind


def written(path, sizes, seed=0):
    """Writes arrays of these sizes one after the other, the last one first, and returns what the file should hold."""
    random = np.random.default_rng(seed)
    parts = [random.integers(0, 256, size, np.uint8) for size in sizes]
    starts = np.cumsum([0, *sizes])[:-1]
    file = DirectFile(path)
    for part, start in [*zip(parts, starts, strict=True)][::-1]:
        file.write(part, int(start))
    file.sync()
    file.close()
    return b"".join(part.tobytes() for part in parts)


SIZES = [(0,), (1,), (4096,), (8, 4088, 4096), (100, 10_000_000, 3), (4095, 4097, 2**22, 2**22 + 1, 5000), (5 * 2**20,)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_file_holds_what_was_written_wherever_it_begins(tmp_path, sizes):
    expected = written(tmp_path / "file", sizes)
    assert (tmp_path / "file").read_bytes() == expected


@pytest.fixture
def direct(monkeypatch):
    """Descriptors that were opened for direct writes; on any file system, with the flag left out."""
    flag, open_, found = 0o40000, os.open, []
    monkeypatch.setattr(os, "O_DIRECT", flag, raising=False)

    def opened(path, flags, *rest):
        descriptor = open_(path, flags & ~flag, *rest)
        found.extend([descriptor] * bool(flags & flag))
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    return found


def test_blocks_go_around_the_page_cache(tmp_path, monkeypatch, direct):
    sent, write = [], os.pwrite

    def pwrite(descriptor, data, offset):
        sent.extend([(len(data), offset)] * (descriptor in direct))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    expected = written(tmp_path / "file", (100, 10_000_000, 3))
    assert (tmp_path / "file").read_bytes() == expected
    assert all(size % 4096 == 0 == offset % 4096 for size, offset in sent)
    assert sum(size for size, _ in sent) > 9_990_000


@pytest.mark.parametrize("how", ["no such flag", "not to be opened", "not to be written"])
def test_a_file_system_without_it(tmp_path, monkeypatch, direct, how):
    open_, write = os.open, os.pwrite

    def opened(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_(path, flags, *rest)

    def pwrite(descriptor, data, offset):
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    if how == "not to be opened":
        monkeypatch.setattr(os, "open", opened)
    if how == "no such flag":
        monkeypatch.delattr(os, "O_DIRECT")
    expected = written(tmp_path / "file", (100, 10_000_000, 3))
    assert (tmp_path / "file").read_bytes() == expected
    assert len(direct) == (how == "not to be written")


def test_a_full_disk_is_not_taken_for_that(tmp_path, monkeypatch):
    def pwrite(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    file = DirectFile(tmp_path / "file")
    with pytest.raises(OSError, match="No space left"):
        file.write(np.zeros(10**6, np.uint8), 0)
    file.close()


def test_items_are_consumed_in_order_while_the_next_is_made():
    seen, made = [], threading.Event()

    def items():
        yield 1
        made.set()
        yield 2

    consume_behind(items(), lambda item: seen.append((item, made.wait(10))))
    assert seen == [(1, True), (2, True)]


def test_an_error_stops_what_would_come_after_it():
    seen = []

    def consume(item):
        seen.append(item)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        consume_behind(range(3), consume)
    assert seen == [0]
    with pytest.raises(OSError, match="gone"):
        consume_behind([1], consume)


def test_an_item_is_gone_before_the_next_but_one_is_made():
    class Item:
        pass

    alive = weakref.WeakSet()

    def items():
        for _ in range(4):
            gc.collect()
            assert len(alive) <= 1
            item = Item()
            alive.add(item)
            yield item
            del item

    consume_behind(items(), lambda item: None)
