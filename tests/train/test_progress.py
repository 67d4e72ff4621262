import io

import pytest
from rich.console import Console

from linnet.train.progress import TrainingProgress, format_count, format_duration


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def run(progress, steps):
    with progress:
        for step in steps:
            progress.update(
                step,
                loss=2.0,
                tokens_per_s=12345.0,
                mfu=0.41,
                bits_per_byte=1.5 if step > 1 else None,
            )


def test_terminal_shows_the_figures_and_logs_nothing():
    screen, lines = console(terminal=True), []
    run(TrainingProgress(20, "nano", console=screen, log=lines.append), range(1, 21))
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    for text in ("nano", "20/20", "loss 2.000", "1.500 bits/byte", "12.3k tokens/s", "MFU 41.0%"):
        assert text in shown
    assert lines == []


def test_log_gets_the_first_and_the_last_step_only_when_all_is_quick():
    screen, lines = console(terminal=False), []
    run(TrainingProgress(50, "nano", console=screen, log=lines.append), range(1, 51))
    assert len(lines) == 2
    assert "step 1/50" in lines[0] and "bits/byte" not in lines[0]
    assert "step 50/50" in lines[1] and "1.500 bits/byte" in lines[1]
    assert screen.file.getvalue() == ""  # type: ignore[attr-defined]


def test_last_step_is_not_logged_twice():
    lines = []
    progress = TrainingProgress(
        3, "nano", console=console(terminal=False), log=lines.append, log_every_s=0.0
    )
    run(progress, [1, 2, 3])
    assert [line.split("  ")[0] for line in lines] == [f"nano: step {n}/3" for n in (1, 2, 3)]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log"])
def test_disabled_progress_is_silent(terminal):
    screen, lines = console(terminal), []
    run(TrainingProgress(5, "n", enabled=False, console=screen, log=lines.append), range(1, 6))
    assert lines == [] and screen.file.getvalue() == ""  # type: ignore[attr-defined]


def test_loss_is_smoothed_and_recovers_after_a_non_finite_step():
    lines = []
    progress = TrainingProgress(
        4, "nano", console=console(terminal=False), log=lines.append, log_every_s=0.0
    )
    with progress:
        for step, loss in enumerate([4.0, 2.0, float("nan"), 3.0], start=1):
            progress.update(step, loss=loss)
    assert [line.split("loss ")[1].split()[0] for line in lines] == [
        "4.000",
        "3.900",
        "nan",
        "3.000",
    ]


def test_error_inside_the_block_still_reports_the_last_step_and_propagates():
    lines = []
    progress = TrainingProgress(9, "nano", console=console(terminal=False), log=lines.append)
    with pytest.raises(KeyError), progress:
        progress.update(1, loss=1.0)
        progress.update(2, loss=1.0)
        raise KeyError
    assert "step 2/9" in lines[-1]


def test_resumed_run_counts_from_its_first_step():
    lines = []
    progress = TrainingProgress(
        100, "nano", initial_step=90, console=console(terminal=False), log=lines.append
    )
    with progress:
        progress.update(91, loss=1.0)
    assert "step 91/100" in lines[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (950, "950"), (12345, "12.3k"), (999_600, "1.00M"), (456e9, "456B")],
)
def test_counts_have_three_digits(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m 00s"), (750, "12m 30s"), (11100, "3h 05m"), (187200, "2d 04h")],
)
def test_durations_use_two_units(seconds, text):
    assert format_duration(seconds) == text
