"""Messages, progress and closing reports of the commands, on stderr."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

LOG_SECONDS = 5.0


def say(message: str) -> None:
    print(f"vitrail: {message}", file=sys.stderr, flush=True)


@contextmanager
def say_warnings() -> Iterator[None]:
    """Says the warnings of Python as messages."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                say(str(warning.message))


def report_unread(unread: Mapping[str, int]) -> None:
    """Names the image formats that a listing skipped, so that the user knows what is missing."""
    if unread:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        say(f"skipped, because Vitrail does not read these formats: {counts}")


def report_failures(failed: int, inputs: int, reasons: Sequence[tuple[object, str]]) -> None:
    """Prints how many images failed, and why the first few did."""
    from vitrail.jobs.listing import shown
    from vitrail.jobs.rows import REASONS

    if not failed:
        return
    say(f"{failed} of {inputs} images failed:")
    for source, reason in reasons[:REASONS]:
        path, text = shown(source), shown(reason)
        print(f"  {text if path in text else f'{path}: {text}'}", file=sys.stderr)
    if failed > REASONS:
        print(f"  and {failed - REASONS} more", file=sys.stderr)


@contextmanager
def progress(
    total: int, unit: str = "images", resumes: bool = False
) -> Iterator[Callable[[int], None]]:
    """A progress bar if stderr is a terminal, or else a line every few seconds.

    ``resumes``: the first report counts what an earlier run has done, which the pace leaves out.
    """
    before = None if resumes else 0
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=f" {unit}", file=sys.stderr) as bar:

            def draw(done: int) -> None:
                nonlocal before
                if before is None:
                    before = bar.n = bar.initial = done
                    bar.refresh()
                bar.update(done - bar.n)

            yield draw
        return
    start = logged = time.monotonic()

    def log(done: int) -> None:
        nonlocal before, logged
        before = done if before is None else before
        seconds = time.monotonic()
        if seconds - logged >= LOG_SECONDS:
            logged = seconds
            rate = (done - before) / (seconds - start)
            pace = f"{rate:.1f}/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s each"
            say(f"{done} of {total} {unit}, {pace}")

    yield log
