"""Work that goes on beside other work: folding is arithmetic, compiling is Python and a C++ compiler."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def beside(step: Callable[[], bool]) -> Iterator[None]:
    """Repeats `step` in a thread of its own while the block runs, until it returns False; what is left is the caller's.

    The thread computes with one of torch's threads less than there are: the block needs a core. Where there is but one,
    nothing is done. An error of a step is raised at the end of the block.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    ended, errors = threading.Event(), list[BaseException]()

    def repeat() -> None:
        torch.set_num_threads(threads - 1)
        try:
            while not ended.is_set() and step():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=repeat, name="larosa-beside", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        torch.set_num_threads(threads)  # the number is the thread's own, but new threads begin with the last one set
    if errors:
        raise errors[0]
