import io
import logging

from cache_pipeline import progress
from cache_pipeline.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_with_rate_and_notes():
    terminal = Terminal()
    with Progress("encode", 10, "images", stream=terminal) as bar:
        for _ in range(10):
            bar.advance(1, loss="0.5")
    shown = terminal.getvalue()
    assert "encode" in shown
    assert "10/10" in shown
    assert "loss=0.5" in shown


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_a_log_gets_a_quiet_line_now_and_then(monkeypatch, request):
    heard, logger = Lines(), logging.getLogger("cache_pipeline")
    request.addfinalizer(lambda level=logger.level: logger.setLevel(level))
    logger.setLevel(logging.INFO)
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(logger, "handlers", [heard])
    out = io.StringIO()
    with Progress("encode", 10, "images", done=4, stream=out) as bar:
        bar.advance(3)
    assert out.getvalue() == ""
    assert [line.split(",")[0] for line in heard.lines] == ["encode: 7/10 images"]
