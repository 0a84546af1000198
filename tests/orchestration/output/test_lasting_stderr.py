"""Output whose reader has ended."""

from __future__ import annotations

import os
import sys

import click
import pytest

from orchestration.output.console import Console
from orchestration.output.lasting_stderr import lasting_stderr


def test_messages_go_on_when_their_reader_has_ended() -> None:
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as pipe:
        with lasting_stderr(pipe):
            click.echo("heard", err=True)
            assert os.read(reading, 100) == b"heard\n"
            os.close(reading)
            for _ in range(3):
                click.echo("unheard", err=True)
                sys.stderr.write("unheard")
                sys.stderr.flush()
            assert not sys.stderr.isatty()
        pipe.write("the descriptor is open, and leads nowhere")


def test_a_table_whose_reader_has_ended_is_the_end_of_the_output_and_no_error_of_rich() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:
        with pytest.raises(BrokenPipeError):
            Console(file=pipe).print("a")
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())
