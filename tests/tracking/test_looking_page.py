"""The commands of docs/looking.md exist as they stand there."""

import re
import shlex
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "looking.md"


def test_every_command_of_the_page_is_understood():
    from polyaccel.cli.main import parser

    lines = re.findall(r"^polyaccel (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    options = [parser().parse_args(shlex.split(line, comments=True)) for line in lines]
    assert [one.command for one in options] == ["runs", "runs", "runs", "runs", "compare", "launch"]
    assert options[4].script_args[-2:] == ["--dropout", "0"]  # argparse of some versions keeps the "--"
