import multiprocessing
import signal

import pytest
import torch

# The networks of the tests are small, and two threads that wait for each other on busy cores are slower than one.
torch.set_num_threads(1)

# What a parent ignores, such as nohup or a shell's background job, every process of the tests would ignore too.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
    signal.signal(number, signal.SIG_DFL)

LONGEST_TEST = 3600
"""Seconds, many times what the longest takes: they end what waits in vain."""


def too_late(*_):
    raise TimeoutError(f"the test has taken longer than {LONGEST_TEST} seconds")


@pytest.fixture(autouse=True)
def nothing_outlives_a_test():
    """Ends a test that waits in vain, and the processes that a test leaves when it fails."""
    before = multiprocessing.active_children()
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(LONGEST_TEST)
    yield
    signal.alarm(0)
    for process in multiprocessing.active_children():
        if process not in before and not process.daemon:  # those end with this process
            process.kill()
            process.join(timeout=60)
