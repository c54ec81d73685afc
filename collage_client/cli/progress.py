"""Progress of a job on standard error: one moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import time
from types import TracebackType
from typing import Self, TextIO

from collage.v1 import collage_service_pb2 as pb

_BAR_CELLS = 24
_ERASE_LINE = "\r\x1b[2K"
# Without a terminal a line is written each time this fraction of the steps is passed.
_LINES_PER_STAGE = 4


class Progress:
    """Shows the events of one job, from its making to the end of a `with`; without a stream it shows nothing.

    `title` stands before each line, so that jobs of a sweep can be told apart.
    """

    def __init__(self, stream: TextIO | None, title: str = "") -> None:
        self._stream = stream
        self._title = f"{title}  " if title else ""
        self._moves = stream is not None and stream.isatty()
        self._start = time.monotonic()
        self._quarter = 0
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def show(self, event: pb.JobEvent) -> None:
        """Shows one event."""
        match event.WhichOneof("kind"):
            case "queued" if event.queued.position:
                ahead = event.queued.position
                self._line(f"queued, {ahead} {'job' if ahead == 1 else 'jobs'} ahead")
            case "stage_started":
                self._quarter = 0
                again = event.stage_started.attempt
                self._line(event.stage_started.stage + (f", attempt {again}" if again > 1 else ""))
            case "step":
                self._step("generate", event.step.step, event.step.total)
            case "word" if event.word.word:
                self._line(f"{event.word.layer} learned: {event.word.word}")
            case "word":
                stage = f"learn {event.word.layer}, loss {event.word.loss:.4f}"
                self._step(stage, event.word.step, event.word.total)
            case "image" if not self._moves:
                self._line(f"image {event.image.index}, seed {event.image.seed}")

    def close(self) -> None:
        """Leaves the terminal with an empty line to go on from."""
        if self._open and self._stream is not None:
            self._stream.write(_ERASE_LINE)
            self._stream.flush()
            self._open = False

    def _step(self, stage: str, step: int, total: int) -> None:
        if self._moves:
            full = _BAR_CELLS * step // max(total, 1)
            bar = "#" * full + "." * (_BAR_CELLS - full)
            self._line(f"{stage}  {bar}  {step}/{total}")
            return
        quarter = _LINES_PER_STAGE * step // max(total, 1)
        if quarter > self._quarter:
            self._quarter = quarter
            self._line(f"{stage}, step {step} of {total}")

    def _line(self, text: str) -> None:
        if self._stream is None:
            return
        passed = f"{time.monotonic() - self._start:5.1f} s"
        if self._moves:
            # A line that wraps could not be erased.
            line = f"{passed}  {self._title}{text}"[: shutil.get_terminal_size().columns - 1]
            self._stream.write(f"{_ERASE_LINE}{line}")
            self._open = True
        else:
            self._stream.write(f"{passed}  {self._title}{text}\n")
        self._stream.flush()
