"""What is shown of a long compilation."""

import time

import pytest

from jaxllm import logs, progress


@pytest.fixture
def watched(monkeypatch):
    """As on a terminal, for the impatient."""
    monkeypatch.setattr(progress, "_is_watched", lambda: True)
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    monkeypatch.setattr(progress, "TICK", 0.01)


def test_a_long_compilation_is_shown_and_its_line_goes(watched, capsys):
    with progress.compiling("decode[8]"):
        time.sleep(0.2)

    shown = capsys.readouterr().err
    assert "compiling decode[8] ... 0.1 s" in shown
    assert shown.rstrip(" ").endswith("\r")
    assert "\n" not in shown


def test_a_short_compilation_is_not_shown(watched, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 30.0)

    with progress.compiling("decode[8]"):
        pass

    assert capsys.readouterr().err == ""


def test_nothing_is_shown_to_a_file_or_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)

    with progress.compiling("decode[8]"):
        time.sleep(0.05)

    assert capsys.readouterr().err == ""


def test_quiet_shows_no_compilation(watched, capsys, monkeypatch):
    monkeypatch.setattr(logs, "_verbosity", "quiet")

    with progress.compiling("decode[8]"):
        time.sleep(0.05)

    assert capsys.readouterr().err == ""


def test_the_line_goes_when_the_compilation_fails(watched, capsys):
    def is_interrupted():
        with progress.compiling("decode[8]"):
            time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        is_interrupted()

    assert capsys.readouterr().err.rstrip(" ").endswith("\r")
