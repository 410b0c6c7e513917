"""A line on the terminal that says how far a long run over text has come."""

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class ThroughputDisplay:
    """Context manager that shows documents, MB/s and tokens/s; silent where stderr is not a terminal."""

    def __init__(self):
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.completed:,} documents"),
            TextColumn("{task.fields[speed]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, speed="")

    def __enter__(self) -> "ThroughputDisplay":
        self._progress.start()
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._progress.stop()

    def update(self, documents: int, text_bytes: int, tokens: int) -> None:
        """Show the counts since the beginning."""
        seconds = self._progress.tasks[0].elapsed or 1e-9
        speed = f"{text_bytes / seconds / 1e6:.1f} MB/s  {tokens / seconds:,.0f} tokens/s"
        self._progress.update(self._task, completed=documents, speed=speed)
