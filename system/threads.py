"""Iterators that are exhausted in threads of their own."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch


def in_threads(iterators, each_alone, bar):
    """Exhaust iterators, and count on a bar what they yield.

    With `each_alone`, each has a thread of PyTorch's to itself, and as many as there are run at the
    same time: if operations are small, that is faster than splitting operations. Otherwise, one
    runs at a time, with all threads. They take turns, so that all end together. An exception in one
    of them is raised here, and ends the others.
    """
    queue = deque(iterators)
    threads = torch.get_num_threads()
    failed = threading.Event()

    def work():
        torch.set_num_threads(1)
        while queue and not failed.is_set():
            with suppress(IndexError):  # another worker took the last one
                take_turn(queue, bar, failed)

    if not each_alone or threads == 1:
        while queue:
            take_turn(queue, bar, failed)
        return
    workers = min(len(queue), threads)
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for worker in [pool.submit(work) for _ in range(workers)]:
                    worker.result()
            except BaseException:
                failed.set()  # the pool waits for its workers
                raise
    finally:
        torch.set_num_threads(threads)


def take_turn(queue, bar, failed):
    """Advance the first iterator of `queue`, and append it again unless it is exhausted."""
    iterator = queue.popleft()
    for count, _ in enumerate(iterator, start=1):
        bar.update()
        if failed.is_set():
            return
        if count == 20 and queue:
            queue.append(iterator)
            return
