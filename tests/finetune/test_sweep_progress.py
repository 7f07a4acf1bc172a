"""Progress of a sweep: plain lines, and the table that a terminal shows."""

import io
from pathlib import Path

from rich.console import Console

from megatron_encdec.finetune.sweep_progress import SweepProgress, name_of

RUN = Path("results/tiny/SC/library/lr1e-05_sd0")


def test_plain_lines(capsys):
    with SweepProgress(total=4, finished=1, failed=0) as shown:
        shown.begun(0, RUN)
        shown.step(0, 5, 100)
        shown.ended(0, RUN, "validation 91.00  test 90.50", is_failure=False)
        shown.begun(0, RUN)
        shown.ended(0, RUN, "FAILED: diverged", is_failure=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2/4  tiny/SC/library/lr1e-05_sd0  validation 91.00  test 90.50  0:00  ")
    assert lines[0].endswith(" left") and lines[1].startswith("3/4  tiny/SC/library/lr1e-05_sd0  FAILED: diverged")
    assert len(lines) == 2


def test_the_live_table():
    shown = SweepProgress(total=4, finished=1, failed=1)
    shown.begun(0, RUN)
    shown.begun(1, RUN.with_name("lr2e-05_sd0"))
    shown.step(1, 50, 100)
    screen = io.StringIO()
    Console(file=screen, width=100, force_terminal=False).print(shown._render())
    text = screen.getvalue()
    assert "lr1e-05_sd0" in text and "preparing" in text and "50/100" in text
    assert "2 of 4 runs done, 1 failed; ? left" in text


def test_names_of_runs():
    assert name_of(RUN) == "tiny/SC/library/lr1e-05_sd0"
