"""The command line as a program among others: its reader may leave early."""

import subprocess
import sys


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = [sys.executable, "-m", "polyaccel.cli.main", "config", "show"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # what `| head` does
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")  # 128 + SIGPIPE, as other programs of a pipe end
