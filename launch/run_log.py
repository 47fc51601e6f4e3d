"""What rank 0 keeps and shows of a run: a JSON line and the progress at every step, a table and a figure at the end."""

from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console

from display import Progress, closing_table
from figure import save_figure
from step import Step


class RunLog:
    """Use it as a context around the training loop, then call `finish`."""

    def __init__(self, out: Path, *, after: int, total: int) -> None:
        """Start the files in `out`, or, if the run goes on `after` a checkpoint's step, keep the lines up to there."""
        self.lines = out / "steps.jsonl"
        self.picture = out / "steps.png"
        self.console = Console()
        self.progress = Progress(self.console, total=total)
        self.steps = _earlier_steps(self.lines, after)
        out.mkdir(parents=True, exist_ok=True)
        self.lines.write_text("".join(f"{step.to_json()}\n" for step in self.steps))

    def __enter__(self) -> Self:
        self.file = self.lines.open("a", buffering=1)  # line-buffered: `tail -f` follows the run
        self.progress.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.bar.stop()
        self.file.close()

    def write(self, step: Step) -> None:
        """Keep and show one more step."""
        self.steps.append(step)
        self.file.write(f"{step.to_json()}\n")
        self.progress.show(self.steps)

    def finish(self, title: str, *, draw_threshold: bool) -> None:
        """Draw the figure and print the table."""
        save_figure(self.steps, self.picture, title=title, draw_threshold=draw_threshold)
        self.console.print(closing_table(self.steps, title=title, files=(self.lines, self.picture)))


def _earlier_steps(lines: Path, after: int) -> list[Step]:
    """Steps that ran past the checkpoint before the run was stopped are trained again, so their lines go."""
    if not after or not lines.exists():
        return []
    steps = map(Step.from_json, lines.read_text().splitlines())
    return [step for step in steps if step.step <= after]
