"""How contenders of benchmarks are timed, in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.timing import alternate

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


def test_what_a_run_frees_is_kept_for_the_next():
    body = """
import resource
def make():
    def run():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            blocks = [b"1" * 8_000_000 for _ in range(4)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return run
contender = Contender(make)
print(contender.output < 16 * 8_000_000 / 4096)  # pages of 16 blocks at most, not of all 40
contender.close()
"""
    assert run(body) == ["True", ""]


def test_each_round_has_its_order():
    order = []
    times = alternate({name: name for name in "abcde"}, 6, measure=lambda name, _: order.append(name) or 0.0)
    rounds = ["".join(order[begin : begin + 5]) for begin in range(0, 30, 5)]
    assert all(sorted(names) == list("abcde") for names in rounds) and len(set(rounds)) > 3
    assert all(seconds == [0.0] * 6 for seconds in times.values())


# of a model: two that wait beside each other, two that are too large for that
CASE = """
import os
import numpy as np
from types import SimpleNamespace
from benchmarks.models import measure
def contender(name, output, alone=False):
    def make():
        others = [other for other in os.listdir({folder!r}) if other != "torch"]
        for other in others if alone else ():
            try:
                os.kill(int(open(os.path.join({folder!r}, other)).read()), 0)
            except ProcessLookupError:
                continue
            raise RuntimeError(other + " is still there")
        open(os.path.join({folder!r}, name), "w").write(str(os.getpid()))
        return lambda: np.full(3, output)
    return make
makers = {{name: contender(name, 1.0) for name in ("torch", "keras")}} | {{"wrong": contender("wrong", 1.1)}}
makers |= {{name: contender(name, 1.0, True) for name in ("keras dense", "keras gather")}}
case = SimpleNamespace(
    **dict(model="a model", size=224, batch=1, training=True, flops=10**6),
    apart={{"keras dense", "keras gather"}},
    contenders=lambda: dict(makers),
)
"""


def test_contenders_that_are_too_large_are_timed_after_the_others(tmp_path):
    body = CASE.format(folder=str(tmp_path))
    body += """
measured = measure(case, 2, lambda name: name != "sgemm", time.perf_counter)
print(sorted(measured["contenders"]))
print(measured["failed"])
print(all(0 < result["seconds"] < 1 for result in measured["contenders"].values()))
"""
    names, failed, timed, _ = run(body)
    assert names == "['keras', 'keras dense', 'keras gather', 'torch']"
    assert failed == "{'wrong': 'its output is off by 1.0e-01'}"
    assert timed == "True"


def test_without_the_reference_nothing_is_measured(tmp_path):
    body = CASE.format(folder=str(tmp_path))
    body += """
makers["torch"] = lambda: 1 / 0
try:
    measure(case, 2, lambda name: True, time.perf_counter)
except ContenderError as error:
    print(error)
"""
    assert run(body) == ["division by zero", ""]


def test_what_was_timed_stays_if_the_reference_ends_later(tmp_path):
    body = CASE.format(folder=str(tmp_path))
    body += """
apart = makers["keras gather"]
def ends_the_reference():
    os.kill(int(open(os.path.join(%r, "torch")).read()), 9)
    return apart()
makers["keras gather"] = ends_the_reference
measured = measure(case, 2, lambda name: name != "wrong", time.perf_counter)
print(sorted(measured["contenders"]), measured["failed"])
"""
    assert run(body % str(tmp_path)) == ["['keras', 'keras dense', 'keras gather', 'torch'] {}", ""]
