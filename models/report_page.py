"""The report of one run, or of two side by side, as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import report_curves, report_pictures
from .page import Html, join, page, table, tag
from .report_curves import Line, line_chart
from .report_evaluation import MOST_LINES, evaluation_sections
from .report_study import SIZES, Subject, recorded_ap
from .report_tables import STYLE as TABLES
from .report_tables import clock, comparison, moment, number
from .run_record import RunRecord

STYLE = (
    report_curves.STYLE
    + report_pictures.STYLE
    + TABLES
    + """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0 }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem }
.card b { font-size: 1.45rem; font-variant-numeric: tabular-nums; display: block; line-height: 1.3 }
.card span { font-size: 13px; color: var(--soft) } .card .second { color: var(--c1) }
.cards.two .first { color: var(--c0) }
.note { border-left: 4px solid var(--warn); background: var(--panel); padding: .5rem .9rem; max-width: 60rem }
nav { margin: .8rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: 14px }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
details { margin: .4rem 0 } summary { cursor: pointer; font-weight: 600 } code { overflow-wrap: anywhere }
.summary { max-width: none; margin: .2rem 0 } .settings { columns: 22rem; column-gap: 2rem; font-size: 14px }
.settings div { display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid;
  border-bottom: 1px solid var(--line) } .settings span { text-align: right; overflow-wrap: anywhere }
"""
)


def report_page(subjects: Sequence[Subject]) -> str:
    """HTML of one run, or of two."""
    sections = {
        "Curves": _curves(subjects),
        **evaluation_sections(subjects),
        "Time and memory": _time(subjects),
        "Settings": _settings(subjects),
    }
    links = tag("nav", *(tag("a", name, href=f"#{_anchor(name)}") for name in sections))
    title = " beside ".join(subject.name for subject in subjects)
    body = [tag("section", tag("h2", name), content, id=_anchor(name)) for name, content in sections.items()]
    heading = tag("header", tag("h1", *_names(subjects)), *map(_summary, subjects), links)
    return page(f"Training run {title}", heading, _cards(subjects), _notes(subjects), *body, style=STYLE)


def _names(subjects: Sequence[Subject]) -> list[object]:
    if len(subjects) == 1:
        return [subjects[0].name]
    both = [Html(f'<span class="swatch" style="background:var(--c{i})"></span>') for i in range(2)]
    return [both[0], subjects[0].name, tag("span", " beside ", class_="soft"), both[1], subjects[1].name]


def _summary(subject: Subject) -> Html:
    """What it is, on which data, where and when, in a line or two."""
    run = subject.run
    data = (f"{word}: {_data(run, split)}" for word, split in (("trained on", "train"), ("validated on", "val")))
    parts = [run.settings.get("arch"), _state(run), *(data if run.data("train") else ())]
    if run.starts:
        last = run.starts[-1]
        device = "" if last.get("device") in ("cpu", None) else f"{last['device']}, "
        machine = f"{device}{last.get('processor', '-')}, {last.get('processors', '-')} processors"
        machine += "" if last.get("processes", 1) == 1 else f", {last['processes']} processes"
        parts += [machine, _versions(last), moment(last["time"]) + " UTC"]
    return tag("p", " · ".join(map(str, parts)), class_="soft summary")


def _state(run: RunRecord) -> str:
    step, epochs = run.last_step(), run.settings.get("epochs")
    if not step:
        return "nothing logged yet"
    if run.is_finished():
        return f"finished after {step:,} steps"
    return f"not finished: step {step:,}, epoch {number(run.epoch(step), 1)} of {epochs}"


def _cards(subjects: Sequence[Subject]) -> Html:
    cards = [
        ("mask AP", [number(recorded_ap(s.run, "mask_ap")) for s in subjects]),
        ("box AP", [number(recorded_ap(s.run, "box_ap")) for s in subjects]),
        ("VOC mAP", [number(recorded_ap(s.run, "voc_map")) for s in subjects]),
        ("duration", [clock(s.run.seconds()) for s in subjects]),
        ("images/s in training", [number(_median(s.run, "images_per_second"), 1) for s in subjects]),
        ("peak memory, GiB", [number(_peak(s.run), 2) for s in subjects]),
        ("last loss", [number(s.run.steps[-1].get("loss", math.nan) if s.run.steps else math.nan) for s in subjects]),
    ]
    kinds = ("first", "second")
    drawn = [
        tag("div", *(tag("b", text, class_=kinds[i]) for i, text in enumerate(texts)), tag("span", name), class_="card")
        for name, texts in cards
        if any(text != "-" for text in texts)
    ]
    return tag("div", *drawn, class_="cards two" if len(subjects) > 1 else "cards")


def _notes(subjects: Sequence[Subject]) -> Html:
    """What the report lacks, and why."""
    notes = []
    for subject in subjects:
        lacks = []
        if not subject.run.steps:
            lacks.append("no step has been logged (metrics.jsonl), so there are no curves")
        if not subject.run.starts:
            lacks.append("starts.jsonl is not there: start, machine and versions are not known")
        if isinstance(subject.study, str):
            lacks.append(f"errors, confusion, sizes and images are left out: {subject.study}")
        elif abs(subject.study.main.ap() - _recorded_main_ap(subject)) > 1e-6:  # not where either is NaN
            noted, found = number(_recorded_main_ap(subject)), number(subject.study.main.ap())
            lacks.append(
                "detections.*.json are not of the last evaluation in metrics.jsonl (the run was stopped between the "
                f"two, or files were exchanged): AP {found} by the former, {noted} by the latter"
            )
        notes += [tag("p", tag("b", f"{subject.name}: "), text, class_="note") for text in lacks]
    return join(notes)


def _recorded_main_ap(subject: Subject) -> float:
    return recorded_ap(subject.run, {"segm": "mask_ap", "bbox": "box_ap"}[subject.study.main_kind])


# ---- curves


def _curves(subjects: Sequence[Subject]) -> Html:
    in_epochs = all(not math.isnan(subject.run.epoch(1)) for subject in subjects)
    label = "epoch" if in_epochs else "step"

    def line(subject: Subject, key: str, name: str | None = None, lines=None, dots: bool = False) -> Line:
        lines = subject.run.steps if lines is None else lines
        x = [subject.run.epoch(values["step"]) if in_epochs else values["step"] for values in lines]
        return Line(name or subject.name, x, [values.get(key, math.nan) for values in lines], dots)

    def of_all(title: str, key: str, evaluations: bool = False) -> Html | None:
        chosen = [s for s in subjects if any(key in x for x in (s.run.evaluations if evaluations else s.run.steps))]
        lines = [line(s, key, lines=s.run.evaluations if evaluations else None, dots=evaluations) for s in chosen]
        return line_chart(title, lines, label) if lines else None

    losses = list(dict.fromkeys(key for s in subjects for x in s.run.steps for key in x if "loss_" in key))
    charts = [of_all("loss, the sum", "loss")]
    if len(subjects) == 1 and losses:
        lines = [line(subjects[0], key, _loss_name(key)) for key in losses]
        charts.append(line_chart("its parts", lines, label))
    if len(subjects) == 1:
        evaluations = subjects[0].run.evaluations
        for title, names in _precisions(evaluations).items():
            found = [line(subjects[0], key, name, evaluations, dots=True) for key, name in names.items()]
            charts.append(line_chart(title, found, label))
    else:
        charts += [of_all("mask AP", "mask_ap", True), of_all("box AP", "box_ap", True)]
    charts += [
        of_all("learning rate", "learning_rate"),
        of_all("norm of the gradient", "gradient_norm"),
        of_all("images/s in training", "images_per_second"),
        of_all("peak memory, GiB", "memory_gib"),
    ]
    drawn = [tag("div", *(chart for chart in charts if chart is not None), class_="charts")]
    if len(subjects) > 1 and losses:
        parts = [of_all(_loss_name(key), key) for key in losses]
        drawn.append(tag("details", tag("summary", "each loss by itself"), tag("div", *parts, class_="charts")))
    return join(drawn)


def _loss_name(key: str) -> str:
    """stage0.loss_class: class, stage 0."""
    stage, _, part = key.rpartition("loss_")
    return part.replace("_", " ") + (f", {stage.rstrip('.').replace('stage', 'stage ')}" if stage else "")


def _precisions(evaluations: Sequence[dict[str, float]]) -> dict[str, dict[str, str]]:
    """Title of a chart -> {key of an evaluation: name}. Sizes and classes are of masks, or else of boxes."""
    keys = list(dict.fromkeys(key for values in evaluations for key in values))
    kind = "mask" if "mask_ap" in keys else "box"
    every = {f"{k}_ap{threshold}": f"{k} AP{threshold}" for k in ("mask", "box") for threshold in ("", "50")}
    every["voc_map"] = "VOC mAP"
    sizes = {f"{kind}_ap_{size}": size for size in SIZES[1:]}
    classes = {key: key.partition("/")[2] for key in keys if key.startswith(f"{kind}_ap/")}
    charts = {"average precision": every, f"{kind} AP by size": sizes, f"{kind} AP by class": classes}
    charts = {title: {key: name for key, name in names.items() if key in keys} for title, names in charts.items()}
    return {title: names for title, names in charts.items() if 0 < len(names) <= MOST_LINES}


# ---- time, memory, machine, settings


def _time(subjects: Sequence[Subject]) -> Html:
    runs = [subject.run for subject in subjects]
    rows = [
        ("state", [_state(run) for run in runs]),
        ("duration", [clock(run.seconds()) for run in runs]),
        ("of which evaluation", [clock(run.evaluation_seconds()) for run in runs]),
        ("images/s in training, median", [number(_median(run, "images_per_second"), 1) for run in runs]),
        ("images/s in evaluation, the last", [number(recorded_ap(run, "images_per_second"), 1) for run in runs]),
        ("peak memory, GiB", [number(_peak(run), 2) for run in runs]),
        ("training images", [_data(run, "train") for run in runs]),
        ("validation images", [_data(run, "val") for run in runs]),
    ]
    parts = [comparison([subject.name for subject in subjects], rows)]
    for subject in subjects:
        starts = subject.run.starts
        if starts:
            title = f"Started and continued: {subject.name}" if len(subjects) > 1 else "Started and continued"
            parts += [tag("h3", title), _all_starts(starts)]
    return join(parts)


def _all_starts(starts: Sequence[dict]) -> Html:
    headings = ("when (UTC)", "from step", "device", "processes", "processor", "memory, GiB", "system", "versions")
    keys = ("step", "device", "processes", "processor", "memory_gib", "system")
    rows = [(moment(start["time"]), *(start.get(key, "-") for key in keys), _versions(start)) for start in starts]
    return table(headings, rows, numbers=(1, 3, 5))


def _versions(start: dict) -> str:
    known = start.get("versions")
    return ", ".join(f"{name} {text}" for name, text in known.items()) if isinstance(known, dict) else "-"


def _data(run: RunRecord, split: str) -> str:
    known = run.data(split)
    if not known:
        return str(run.settings.get("data") or "-")
    return f"{known.get('images', '-')} images of {known.get('classes', '-')} classes from {known.get('name', '-')}"


def _median(run: RunRecord, key: str) -> float:
    values = sorted(line[key] for line in run.steps if not math.isnan(line.get(key, math.nan)))
    return values[len(values) // 2] if values else math.nan


def _peak(run: RunRecord) -> float:
    return max((x["memory_gib"] for x in run.steps if x.get("memory_gib", math.nan) > 0), default=math.nan)


def _settings(subjects: Sequence[Subject]) -> Html:
    settings = [subject.run.settings for subject in subjects]
    names = list(dict.fromkeys(name for one in settings for name in one))
    texts = {name: [_value(one, name) for one in settings] for name in names}
    parts = []
    if len(subjects) > 1:
        differing = [(tag("code", name), values) for name, values in texts.items() if len(set(values)) > 1]
        parts.append(tag("h3", f"Those that differ: {len(differing)} of {len(names)}"))
        parts.append(comparison([subject.name for subject in subjects], differing) if differing else "")
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0] or "training", []).append(name)
    for group, members in groups.items():
        rows = [(tag("code", name.rpartition(".")[2]), texts[name]) for name in members]
        if len(subjects) > 1:
            content = comparison([subject.name for subject in subjects], rows)
        else:
            content = tag("div", *(tag("div", name, tag("span", *values)) for name, values in rows), class_="settings")
        is_open = "" if group == "training" and len(subjects) == 1 else None
        parts.append(tag("details", tag("summary", f"{group} ({len(members)})"), content, open=is_open))
    return join(parts)


def _value(settings: dict[str, object], name: str) -> str:
    if name not in settings:
        return "-"
    value = settings[name]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
