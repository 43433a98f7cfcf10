"""Contenders of benchmarks in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# in a fresh process, as pytest's has threads that a fork would leave behind
SCRIPT = """
import time
from benchmarks.processes import Contender, ContenderError
{}
"""


def run(body):
    command = [sys.executable, "-c", SCRIPT.format(body)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout.split("\n")


def test_a_contender_is_run_timed_and_its_memory_is_told():
    body = """
def make():
    kept = bytearray(b"1") * 50_000_000
    def run():
        bytearray(b"1") * 30_000_000
        time.sleep(0.02)
        return len(kept)
    return run
contenders = [Contender(make), Contender(make)]
print(contenders[0].output, contenders[0].peak)
print(contenders[0].seconds(time.perf_counter) > 0.02, 80e6 < contenders[0].peak < 100e6)
for contender in contenders:
    contender.close()
"""
    assert run(body) == ["50000000 None", "True True", ""]


@pytest.mark.parametrize(
    "failure, message",
    [
        ("raise ValueError('no such model')", "no such model"),
        ("import os; os._exit(1)", "its process ended; perhaps it asked for more memory than there is"),
    ],
)
def test_what_cannot_be_made_or_run_is_told(failure, message):
    body = f"""
def fails():
    {failure}
def make():
    calls = []
    def run():
        calls.append(1)
        if len(calls) > 1:
            fails()
    return run
for attempt in (lambda: Contender(fails), lambda: Contender(make).seconds(time.perf_counter)):
    try:
        attempt()
    except ContenderError as error:
        print(error)
"""
    assert run(body) == [message, message, ""]


def test_one_that_the_system_ends_is_told_each_time():
    body = """
contender = Contender(lambda: lambda: 1)
contender._process.kill()
contender._process.join()
for _ in range(2):
    try:
        contender.seconds(time.perf_counter)
    except ContenderError as error:
        print(error)
"""
    assert run(body) == ["its process ended; perhaps it asked for more memory than there is"] * 2 + [""]
