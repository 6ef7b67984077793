"""Processes that tests start: none of them outlives its test, and nothing waits for one without end."""

import contextlib
import os
import secrets
import subprocess
import sys
import threading
import time

import psutil

COMMAND = [sys.executable, "-m", "dualhead"]
PATIENCE = 600.0
"""Seconds, far more than anything takes on a slow machine that is busy with something else."""
_MARK = "DUALHEAD_TEST"


@contextlib.contextmanager
def started(command, *, env=None, **settings):
    """A process in a group of its own, as a terminal starts it, which gives text.

    At the end, and when patience is over, it is killed with everything it has started. So every read from it and every
    wait for it ends.
    """
    mark = secrets.token_hex(8)
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    env = {**(os.environ if env is None else env), _MARK: mark}
    with subprocess.Popen(command, env=env, **usual | settings) as process:
        alarm = threading.Timer(PATIENCE, _kill, [mark])
        alarm.daemon = True
        alarm.start()
        try:
            yield process
        finally:
            alarm.cancel()
            _kill(mark)


def run_process(command, **settings):
    """Runs a process to its end; returns its exit status and what it said, as `subprocess.run` does."""
    with started(command, **settings) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def wait_until(condition, *, of=None):
    """Waits for a condition; fails when patience is over, or when the process `of` has ended without it."""
    end = time.monotonic() + PATIENCE
    while not condition():
        is_over = of is not None and of.poll() is not None and not condition()
        assert not is_over, f"the process has ended with status {of.returncode}"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _kill(mark):
    """Kills all processes with the mark in their environment, orphans included."""
    while members := [process for process in psutil.process_iter() if _is_marked(process, mark)]:
        for process in members:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def _is_marked(process, mark):
    try:
        return process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
