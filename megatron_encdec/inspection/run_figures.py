"""The figures of a run's page: losses, learning rate, gradient norm, speed, time line, epochs of the sources.

One run: a colour for each objective. Several runs over each other: a colour for each run, and a figure for each
objective, since losses of two objectives are not the same thing. Phases, resumes and what else happened is marked.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_encdec.inspection.history import RunHistory, Series
from megatron_encdec.page.drawing import INK, MUTED, STYLE, Picture, colour, curve, curve_panel, legend_below
from megatron_encdec.platform.optional import require
from megatron_encdec.platform.progress import short_count

HEIGHT = 3.3  # inches, of a curve's figure
TEXT = {**STYLE, "font.size": 10.5, "axes.titlesize": 11}
DASHES = ("-", "--", ":", "-.")
LABELLED = 0.12  # part of the width that a phase needs to have its name above the panel
MARKS = {"checkpoint": ("o", "#009E73", "checkpoint"), "resume": ("^", INK, "begun or continued"),
         "change": ("D", "#E69F00", "changed key"), "skip": ("x", "#b3261e", "skipped step"),
         "failed save": ("X", "#b3261e", "failed save"), "failure": ("s", "#b3261e", "failed")}
SHOWN_SOURCES = 8  # lines in a figure of epochs
CURVES = (  # field of the train lines, section, title, label of the axis, factor, caption
    ("lr", "optimizer", "Learning rate", "learning rate", 1, "As used, step by step."),
    ("grad_norm", "optimizer", "Gradient norm", "norm before clipping", 1,
     "Over the whole trunk, before it is clipped."),
    ("tokens_per_second", "speed", "Tokens a second", "tokens/s", 1,
     "Of the steps alone, without evaluation and saving."),
    ("mfu", "speed", "MFU", "% of the device's peak", 100, "Model FLOPs utilisation."))


def short_names(directories: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [Path(one).parts for one in directories]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*one[-count:])) for one in parts]
        if len(set(names)) == len(names):
            return names
    return list(directories)


class RunFigures:
    """Draws for `runs`, one or more, in the order given."""

    def __init__(self, runs: Sequence[RunHistory]):
        self.runs, self.names = runs, short_names([run.directory for run in runs])
        sizes = {tuple(run.tokens([1, run.planned])) for run in runs}
        self.by_tokens = len({first for first, _ in sizes}) > 1 or any(
            len({one.tokens_per_step for one in run.stretches}) > 1 for run in runs)
        self.objectives = list(dict.fromkeys(
            name for run in runs for name in (*run.losses, *run.validation)))

    def all(self) -> list[Picture]:
        """Every figure that has something to show. Raises `UserError` where matplotlib is not installed."""
        with require("matplotlib", "inspect run --page").rc_context(TEXT):
            found = [*self._losses(), *self._validation(), *(self._of_field(*one) for one in CURVES), self._timeline(),
                     *self._distances()]
            return [picture for picture in found if picture is not None]

    def epochs(self, place: int, series: Mapping[str, Series]) -> Picture:
        """How often each source of run number `place` was read."""
        run, dashes = self.runs[place], itertools.cycle(DASHES)
        with require("matplotlib", "inspect run --page").rc_context(TEXT):
            figure, axis = self._panel("epochs", [run])
            names = short_names(list(series)) if series else []
            for number, (name, one) in enumerate(zip(names, series.values(), strict=True)):
                if number < SHOWN_SOURCES:
                    axis.plot(self._x(run, one.steps_P), one.values_P, color=colour(number), ls=next(dashes), lw=1.8,
                              label=name)
            axis.set_ylim(bottom=0)
            legend_below(figure)
        rest = f" The first {SHOWN_SOURCES} of {len(series)} sources." if len(series) > SHOWN_SOURCES else ""
        of = "" if len(self.runs) == 1 else f" of {self.names[place]}"
        return Picture(f"epochs_{place}" if of else "epochs", "data", f"Epochs of the sources{of}",
                       f"How often each source was read, on average over its windows.{rest}", figure)

    def _losses(self) -> list[Picture | None]:
        caption = "Nats a label. Faint: each logged step (of many the lowest and highest); strong: the running mean."
        if len(self.runs) > 1:
            return [self._over_each_other(f"loss_{name}", "loss", f"Training loss: {name}", caption,
                                          {place: run.losses.get(name, []) for place, run in enumerate(self.runs)})
                    for name in self.objectives]
        (run,), entropy = self.runs, self.runs[0].report["unigram_entropy"]
        figure, axis = self._panel("training loss, nats", self.runs)
        for name, parts in run.losses.items():
            for number, one in enumerate(parts):
                curve(axis, self._x(run, one.steps_P), one.values_P, self._hue(name),
                      name if number == 0 else "_" + name)
        if entropy:
            axis.axhline(entropy["nats"], color=MUTED, lw=1.2, ls=":", label="unigram entropy")
            caption += " Dotted: the unigram entropy, what token frequencies alone give."
        legend_below(figure)
        return [Picture("loss", "loss", "Training loss", caption, figure)]

    def _validation(self) -> list[Picture | None]:
        caption = "Nats a label, always on the same windows, whichever objective is trained."
        if len(self.runs) > 1:
            return [self._over_each_other(
                f"validation_{name}", "loss", f"Validation loss: {name}", caption,
                {place: [run.validation[name]] if name in run.validation else []
                 for place, run in enumerate(self.runs)}) for name in self.objectives]
        return [self._of_names("validation", "loss", "Validation loss", "validation loss, nats", caption,
                               self.runs[0].validation, self._hue)]

    def _distances(self) -> list[Picture | None]:
        caption = "Relative to the norm of the weights that the phase began with."
        return [self._of_names(f"distance_{place}", "distance", f"Distance from the phase's first weights: {name}",
                               "distance", caption, run.distances, None, run)
                for place, (run, name) in enumerate(zip(self.runs, self.names, strict=True))]

    def _of_names(self, name: str, section: str, title: str, label: str, caption: str, series: Mapping[str, Series],
                  hue: Callable[[str], str] | None, run: RunHistory | None = None) -> Picture | None:
        """A figure of one run with a line for each name."""
        if not series:
            return None
        run = run or self.runs[0]
        figure, axis = self._panel(label, [run])
        for number, (what, one) in enumerate(series.items()):
            axis.plot(self._x(run, one.steps_P), one.values_P, marker="" if len(one.steps_P) > 60 else ".",
                      color=hue(what) if hue else colour(number), ls=DASHES[number // 8 % len(DASHES)], lw=1.8,
                      label=what)
        legend_below(figure)
        return Picture(name, section, title, caption, figure)

    def _of_field(self, key: str, section: str, title: str, label: str, factor: float, caption: str) -> Picture | None:
        found = {place: [one._replace(values_P=factor * one.values_P) for one in run.series(key)]
                 for place, run in enumerate(self.runs)}
        picture = self._over_each_other(key, section, title, caption, found, label)
        if picture and key == "grad_norm":
            limits = {run.config.optimizer.clip_grad for run in self.runs} - {0}
            picture = replace(picture, caption=f"{caption} Dotted: the most that is left." if limits else caption)
            axis = picture.figure.axes[0]
            for limit in limits:
                axis.axhline(limit, color=INK, lw=1.2, ls=":")
            axis.set_ylim(bottom=0, top=_without_spikes(found, [*limits]))
        elif picture:
            picture.figure.axes[0].set_ylim(bottom=0)
        return picture

    def _over_each_other(self, name: str, section: str, title: str, caption: str,
                         series: Mapping[int, list[Series]], label: str = "nats") -> Picture | None:
        """A figure with a line for each run, by its number, in pieces."""
        if not any(series.values()):
            return None
        mine = [self.runs[place] for place, parts in series.items() if parts]
        figure, axis = self._panel(label, mine)
        for place, parts in series.items():
            for number, one in enumerate(parts):
                curve(axis, self._x(self.runs[place], one.steps_P), one.values_P, colour(place),
                      self.names[place] if number == 0 else f"_{number}", DASHES[place // 8 % len(DASHES)],
                      is_noisy=name != "lr")
        if len(self.runs) > 1:
            legend_below(figure)
        return Picture(name, section, title, caption, figure)

    def _panel(self, label: str, runs: Sequence[RunHistory]):
        """A figure and its panel, with the phases and resumes of `runs` marked."""
        figure, axis = curve_panel(HEIGHT)
        axis.set_ylabel(label)
        axis.set_xlabel("million tokens" if self.by_tokens else "step")
        axis.grid(axis="x", visible=False)
        if not self.by_tokens:
            axis.xaxis.set_major_formatter(lambda step, _: short_count(step) if step >= 10_000 else f"{step:g}")
        axis.locator_params(axis="x", nbins=6)
        end = max(float(self._x(run, [max(1, run.step)])[0]) for run in runs)
        axis.set_xlim(0, end * 1.01)
        for run in runs:
            hue = MUTED if len(self.runs) == 1 else colour(self.runs.index(run))
            for name, begin, last in run.phase_ends:
                first, ends = self._x(run, [begin, min(last, run.step)])
                if last < run.step:
                    axis.axvline(ends, color=hue, lw=1.1, ls="--", alpha=0.8)
                if len(self.runs) == 1 and ends - first > LABELLED * end:
                    axis.text((first + ends) / 2, 1.02, name, transform=axis.get_xaxis_transform(), ha="center",
                              va="bottom", color=MUTED, fontsize=9, clip_on=False)
            if steps := [event.step for event in run.events if event.kind == "resume"]:  # none would widen the margins
                axis.plot(self._x(run, steps), [0.0] * len(steps), "^", color=hue, ms=5, clip_on=False, zorder=6,
                          transform=axis.get_xaxis_transform())
        return figure, axis

    def _timeline(self) -> Picture:
        """A lane for each run: its phases, as far as they have come, and what happened at which step."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        figure, axis = curve_panel(1.0 + 0.75 * len(self.runs))
        hues, marked = {}, {}
        end = max(float(self._x(run, [run.planned])[0]) for run in self.runs)
        for place, run in enumerate(self.runs):
            for phase, (name, begin, last) in zip(run.report["phases"], run.phase_ends, strict=True):
                hue = hues.setdefault(phase["objective"], self._hue(phase["objective"].partition(":")[0]))
                self._bar(axis, run, place, name, hue, (begin, min(max(begin, run.step), last), last), end)
            happened = {"checkpoint": [line["step"] for line in run.checkpoints]}
            for event in run.events:
                happened.setdefault("resume" if event.kind == "begin" else event.kind, []).append(event.step)
            for number, (kind, (shape, hue, text)) in enumerate(MARKS.items()):
                if steps := happened.get(kind):
                    axis.plot(self._x(run, steps), [place + 0.34 + 0.1 * (number % 2)] * len(steps), shape, color=hue,
                              ms=5, alpha=0.9, clip_on=False)
                    marked[kind] = Line2D([], [], marker=shape, ls="", color=hue, ms=5, label=text)
        axis.set_yticks(range(len(self.runs)), self.names if len(self.runs) > 1 else [""])
        axis.set_ylim(len(self.runs) - 0.35, -0.45)
        axis.set_xlim(0, end * 1.01)
        axis.set_xlabel("million tokens" if self.by_tokens else "step")
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=6)
        handles = [*(Patch(color=hue, label=_shortened(name)) for name, hue in hues.items()), *marked.values()]
        columns = 1 if max(len(one.get_label()) for one in handles) > 34 else 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, labelcolor=INK)
        figure.set_figheight(figure.get_figheight() + 0.23 * -(-len(handles) // columns))
        return Picture("timeline", "timeline", "What happened when", "Phases by objective; pale: still to come.",
                       figure)

    def _bar(self, axis, run: RunHistory, place: int, name: str, hue: str, steps: tuple[int, int, int],
             end: float) -> None:
        """A phase, done from steps[0] to steps[1], planned to steps[2]."""
        begin, now, last = self._x(run, steps)
        axis.barh(place, last - begin, left=begin, height=0.44, color=hue, alpha=0.25, edgecolor="white")
        axis.barh(place, now - begin, left=begin, height=0.44, color=hue, edgecolor="white")
        if last - begin > LABELLED * end and len(name) < 60 * (last - begin) / end:
            axis.text((begin + last) / 2, place, name, ha="center", va="center", fontsize=9.5,
                      color="white" if now == last else INK)

    def _x(self, run: RunHistory, steps):
        return run.tokens(steps) if self.by_tokens else [float(step) for step in steps]

    def _hue(self, objective: str) -> str:
        """Of an objective, by its name without settings."""
        name = objective.partition(" ")[0]
        if name not in self.objectives:
            self.objectives.append(name)
        return colour(self.objectives.index(name))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _without_spikes(series: Mapping[int, list[Series]], limits: list[float]) -> float:
    """Where an axis ends that one step in two hundred may leave."""
    highest = []
    for one in itertools.chain(*series.values()):
        ordered = sorted(one.values_P)
        highest.append(ordered[int(0.995 * (len(ordered) - 1))])
    return 1.1 * max([*highest, *(limit for limit in limits if limit < 3 * max(highest, default=0))], default=1)
