"""What the progress line says besides loss and speed: where in the data, how long still, what holds the run up.

    1. `step`, `held`     told what each step, evaluation and save took
    2. `detail()`         epoch of the data; what takes more than NOTABLE of the time besides computing
    3. `left(step)`       time to the end of the phase and of the run, by the tokens of the last RECENT steps

`curve` is for `--live`: the losses of the phase so far, however many, as a line of text.
"""

import time
from collections import Counter, deque

from megatron_encdec.data.training_data import TrainingData
from megatron_encdec.platform.progress import duration, sparkline
from megatron_encdec.training.stretches import Stretch, Timeline, tokens_between

RECENT = 200  # steps
NOTABLE = 0.1
REFRESH = 1.0  # seconds between looks at the data's epoch
CURVE_POINTS = 480  # losses kept of a phase; then neighbours are averaged
WAITING, SAVING, EVALUATING = "waiting for data", "saving", "evaluating"


class Pace:
    """Of one launch, which ends after step `last`."""

    def __init__(self, timeline: Timeline, data: TrainingData, step: int, last: int):
        self._timeline, self._data, self._last = timeline, data, last
        self._recent: deque[tuple[float, int, Counter]] = deque([(time.perf_counter(), 0, Counter())], RECENT)
        self._tokens, self._spent = 0, Counter()  # of this launch; seconds by what they were spent on
        self._epoch, self._looked = "", -REFRESH
        self._curve: list[float] = []
        self._of_curve: tuple[str, str] | None = None
        self._weight, self._sum = 1, [0.0, 0]  # steps a point of the curve, and what is gathered for the next

    def step(self, stretch: Stretch, waited: float) -> None:
        """A step is done; it waited so many seconds for its data."""
        self._tokens += stretch.tokens_per_step
        self._spent[WAITING] += waited
        self._recent.append((time.perf_counter(), self._tokens, Counter(self._spent)))

    def held(self, what: str, seconds: float) -> None:
        """Training stood still for `what`."""
        self._spent[what] += seconds

    def detail(self, step: int) -> str:
        """`epoch 0.31  waiting for data 40 % of the time`."""
        now = time.monotonic()
        if now - self._looked >= REFRESH:
            self._looked, self._epoch = now, self._epochs(step)
        begun, _, before = self._recent[0]
        seconds = time.perf_counter() - begun
        shares = {what: (spent - before[what]) / seconds for what, spent in self._spent.items()}
        slow = [f"{what} {share:.0%} of the time" for what, share in shares.items() if share > NOTABLE]
        return "  ".join([self._epoch, *slow])

    def left(self, step: int) -> str:
        """`0:40 left of clm, 1:23 of the run`; one time where both are the same."""
        begun, before, _ = self._recent[0]
        if self._tokens == before:
            return "? left"
        pace = (time.perf_counter() - begun) / (self._tokens - before)  # seconds a token
        stretches, stretch = self._timeline.stretches, self._timeline.at(min(step + 1, self._last))
        end = min(self._last, stretch.phase_start + stretch.phase_steps)
        phase, run = (duration(pace * tokens_between(stretches, step, to)) for to in (end, self._last))
        return f"{run} left" if end == self._last else f"{phase} left of {stretch.name}, {run} of the run"

    def _epochs(self, step: int) -> str:
        end = self._timeline.at(step).samples(step).stop
        epochs = self._data.of(end - 1).epochs(end)
        low, high = min(epochs), max(epochs)
        return f"epoch {high:.2f}" if len(epochs) == 1 else f"epochs {low:.2f} to {high:.2f}"

    def curve(self, phase: str, objective: str, loss: float | None, blocks: str) -> str:
        """The losses of this phase and objective with the newest one, as text."""
        if self._of_curve != (phase, objective):
            if self._of_curve and self._of_curve[0] == phase:  # objectives in turn: that of the phase's first step
                loss = None
            else:
                self._of_curve, self._curve, self._weight, self._sum = (phase, objective), [], 1, [0.0, 0]
        if loss is not None:
            self._sum = [self._sum[0] + loss, self._sum[1] + 1]
            if self._sum[1] == self._weight:
                self._curve.append(self._sum[0] / self._weight)
                self._sum = [0.0, 0]
        if len(self._curve) == CURVE_POINTS:
            self._curve = [(a + b) / 2 for a, b in zip(self._curve[::2], self._curve[1::2], strict=True)]
            self._weight *= 2
        return sparkline(self._curve, blocks=blocks)
