"""A background thread that works ahead."""

import atexit
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_POLL = 0.05
"""Seconds after which a producer that waits for room looks whether it is still wanted."""


def prefetched(items: Callable[[], Iterable[T]], depth: int) -> Generator[T, None, None]:
    """Items made by a background thread, at most `depth` of them ahead.

    An exception in the thread is raised here, after the items made before it. When this generator
    is closed, goes out of scope, or the interpreter ends, the thread finishes the item it works on
    and is gone.

    Args:
        items: makes the iterable; called and iterated over in the thread.
        depth: how many items may wait.

    Raises:
        ValueError: if `depth` is not positive.
    """
    if depth < 1:
        raise ValueError(f"depth = {depth} must be positive")
    return _consume(items, depth)


class _Channel:
    """Between the two threads."""

    def __init__(self, depth: int) -> None:
        self.ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self.stop = threading.Event()

    def put(self, kind: str, value: Any = None) -> bool:
        """Wait for room; False if nobody wants it any more."""
        while not self.stop.is_set():
            try:
                self.ready.put((kind, value), timeout=_POLL)
            except queue.Full:
                continue
            return True
        return False


def _consume(items: Callable[[], Iterable[T]], depth: int) -> Generator[T, None, None]:
    channel = _Channel(depth)
    thread = threading.Thread(target=_produce, args=(items, channel), daemon=True)

    def end() -> None:
        channel.stop.set()
        if threading.current_thread() is not thread:  # the garbage collector may run in it
            thread.join()

    # A daemon thread that is inside torch when the interpreter ends would abort the process.
    atexit.register(end)
    thread.start()
    try:
        while True:
            kind, value = channel.ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            del value  # not held here while the next one is awaited
    finally:
        end()
        atexit.unregister(end)


def _produce(items: Callable[[], Iterable[Any]], channel: _Channel) -> None:
    """What the thread does."""
    iterator = None
    try:
        iterator = iter(items())
        for item in iterator:
            if not channel.put("item", item):
                return
            del item
        channel.put("end")
    except BaseException as error:
        channel.put("error", error)
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
