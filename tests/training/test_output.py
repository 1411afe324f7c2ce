"""Programs whose output is no longer read, and output that is suppressed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from training.output import outlive_readers
outlive_readers()
print("first", flush=True)
sys.stdin.readline()  # until the reader has gone
for number in range(10_000):
    print(number, "more than a pipe's or a buffer's size")
    print(number, file=sys.stderr)
sys.stdin.readline()
print("the end")  # left to the flush at exit
sys.exit(7)
"""


def start(*options: str, code: str = CHILD, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env=os.environ | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_reader_that_closes_the_pipe(options):
    process = start(*options)
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.write(b"go\ngo\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 7


def test_everything_reaches_a_reader_that_stays():
    output, _ = start().communicate(b"go\ngo\n", timeout=60)
    lines = output.splitlines()
    assert lines[0] == b"first"
    assert lines[-1] == b"the end"
    assert len(lines) == 2 + 2 * 10_000


def test_characters_that_the_encoding_lacks():
    code = "from training.output import outlive_readers; outlive_readers(); print('\\udce9 é')"
    process = start(code=code, PYTHONIOENCODING="ascii")
    assert process.communicate(timeout=60)[0] == b"\\udce9 \\xe9\n"
    assert process.returncode == 0


def test_a_closed_stream():
    code = "from training.output import outlive_readers; outlive_readers(); print('nowhere')"
    command = f'"{sys.executable}" -c "{code}" >&-'
    assert subprocess.run(command, shell=True, cwd=ROOT, check=False).returncode == 0


def test_only_the_traces_of_abandoned_writes_are_hidden():
    code = """
import sys
from training import output


class Loses:
    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise RuntimeError(self.text)


output.hide_abandoned_writes()
Loses("Event loop is closed")
Loses("something else")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "something else" in done.stderr
    assert "Event loop" not in done.stderr
