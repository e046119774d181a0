"""The sections of a report that are about the last evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .confusion import IOU, SCORE, ImageQuality
from .data import AnnotatedImages
from .error_kinds import KINDS
from .page import Html, join, table, tag
from .report_curves import Line, line_chart
from .report_pictures import Pictures
from .report_study import SIZES, KindStudy, Study, Subject, recorded_ap
from .report_tables import bar, difference, heat, number

MOST_LINES = 12
"""Classes whose curves one chart can hold."""
LARGEST_MATRIX = 25
"""Classes; beyond that the most frequent confusions are listed."""
LISTED = 30
SHOWN = 6
"""Images at either end."""
WORDS = {"segm": "mask", "bbox": "box"}
RECALLS = np.linspace(0, 1, 101).tolist()


def evaluation_sections(subjects: Sequence[Subject]) -> dict[str, Html]:
    """Title -> content; what needs the data or the results is left out for a run that lacks them."""
    sections = {}
    if any(subject.run.evaluations for subject in subjects):
        sections["Average precision"] = _average_precision(subjects)
    studied = [subject for subject in subjects if isinstance(subject.study, Study)]
    if studied:
        sections["Precision and recall"] = _precision_recall(studied)
        sections["Kinds of error"] = _errors(studied)
        sections["Confusion"] = _confusion(studied)
        sections["Images"] = _images(studied)
    return sections


# ---- average precision


def _average_precision(subjects: Sequence[Subject]) -> Html:
    kinds = [kind for kind in WORDS if any(_has(subject, kind) for subject in subjects)]
    columns = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"} | {size: f"ap_{size}" for size in SIZES[1:]}
    rows = []
    for kind in kinds:
        values = [[recorded_ap(s.run, f"{WORDS[kind]}_{key}") for key in columns.values()] for s in subjects]
        for subject, aps in zip(subjects, values, strict=True):
            name = f"{WORDS[kind]}, {subject.name}" if len(subjects) > 1 else WORDS[kind]
            rows.append([name, *map(bar, aps)])
        if len(subjects) > 1:
            rows.append([tag("span", "difference", class_="soft"), *map(difference, *values)])
    every = table(["", *columns], rows, range(1, 7))
    what = (
        "COCO's AP over IoU 0.50:0.95, at most 100 detections an image, of the last evaluation. Small objects have an "
        "area below 32 x 32 pixels, large ones above 96 x 96."
    )
    by_class = _by_class(subjects[0], kinds) if len(subjects) == 1 else _classes_beside(subjects, kinds)
    return join([tag("p", what, class_="soft"), every, tag("h3", "By class"), by_class])


def _has(subject: Subject, kind: str) -> bool:
    return not math.isnan(recorded_ap(subject.run, f"{WORDS[kind]}_ap"))


def _class_names(subjects: Sequence[Subject], kinds: Sequence[str]) -> list[str]:
    """Of the data, or else those that the run wrote down a value for."""
    for subject in subjects:
        if isinstance(subject.study, Study):
            return subject.study.class_names
    keys = [key for subject in subjects for values in subject.run.evaluations[-1:] for key in values]
    prefixes = tuple(f"{WORDS[kind]}_ap/" for kind in kinds)
    return list(dict.fromkeys(key.partition("/")[2] for key in keys if key.startswith(prefixes)))


def _by_class(subject: Subject, kinds: Sequence[str]) -> Html:
    names, study = _class_names([subject], kinds), subject.study
    if isinstance(study, str):
        rows = [
            [name, *(bar(recorded_ap(subject.run, f"{WORDS[kind]}_ap/{name}")) for kind in kinds)] for name in names
        ]
        return table(["class", *(f"{WORDS[kind]} AP" for kind in kinds)], rows, range(1, 3))
    kinds = [kind for kind in kinds if kind in study.kinds]
    headings, rows = ["class", "objects"], [[name, f"{study.num_objects[i]:,}"] for i, name in enumerate(names)]
    for kind in kinds:
        headings += [f"{WORDS[kind]} AP", "AP50", "AP75", *SIZES[1:]]
        part = study.kinds[kind]
        for label, row in enumerate(rows):
            row += [bar(part.ap(label)), number(part.ap(label, threshold=0)), number(part.ap(label, threshold=5))]
            row += [number(part.ap(label, size)) for size in SIZES[1:]]
    return table(headings, rows, range(1, len(headings)))


def _classes_beside(subjects: Sequence[Subject], kinds: Sequence[str]) -> Html:
    headings = ["class"]
    for kind in kinds:
        headings += [*(f"{WORDS[kind]} AP, {subject.name}" for subject in subjects), "difference"]
    rows = []
    for name in _class_names(subjects, kinds):
        row: list[object] = [name]
        for kind in kinds:
            values = [recorded_ap(subject.run, f"{WORDS[kind]}_ap/{name}") for subject in subjects]
            row += [*map(bar, values), difference(*values)]
        rows.append(row)
    return table(headings, rows, range(1, len(headings)))


# ---- precision and recall


def _precision_recall(studied: Sequence[Subject]) -> Html:
    thresholds = {"IoU 0.50": 0, "IoU 0.75": 5, "mean of IoU 0.50:0.95": None}
    charts = []
    if len(studied) == 1:
        study = studied[0].study
        for kind, part in study.kinds.items():
            lines = [Line(name, RECALLS, part.curve(threshold)) for name, threshold in thresholds.items()]
            charts.append(line_chart(_plural(kind), lines, "recall", 1))
        if len(study.class_names) <= MOST_LINES:
            precision = study.main.precision
            lines = [
                Line(name, RECALLS, np.where(precision[0, :, i, 0] < 0, np.nan, precision[0, :, i, 0]))
                for i, name in enumerate(study.class_names)
            ]
            charts.append(line_chart(f"{_plural(study.main_kind)} of each class, IoU 0.50", lines, "recall", 1))
    else:
        for name, threshold in thresholds.items():
            lines = [Line(subject.name, RECALLS, subject.study.main.curve(threshold)) for subject in studied]
            charts.append(line_chart(f"precision, {name}", lines, "recall", 1))
    what = "Precision at each recall, the mean over the classes; a point to the right is reached at a lower score."
    return join([tag("p", what, class_="soft"), tag("div", *charts, class_="charts")])


def _plural(kind: str) -> str:
    return "precision of masks" if kind == "segm" else "precision of boxes"


# ---- errors


def _errors(studied: Sequence[Subject]) -> Html:
    what = (
        "Every wrong detection, and every object that was missed, has one kind. Its cost is by how much AP at IoU 0.50 "
        "would rise if all errors of that kind alone were mended; costs do not add up. Definitions: TIDE (Bolya et "
        "al., ECCV 2020)."
    )
    headings, columns = ["kind", "what it is"], []
    if len(studied) == 1:
        for kind, part in studied[0].study.kinds.items():
            headings += [f"{WORDS[kind]}: how many", "cost in AP50"]
            columns.append(part.errors)
    else:
        for subject in studied:
            headings += [f"{subject.name}: how many", "cost in AP50"]
            columns.append(subject.study.main.errors)
        headings.append("difference of the cost")
    highest = max([1e-9, *(x for errors in columns for x in errors.costs.values() if not math.isnan(x))])
    rows = []
    for kind, meaning in KINDS.items():
        row: list[object] = [kind, tag("span", meaning, class_="soft")]
        for errors in columns:
            row += [f"{errors.counts[kind]:,}", _cost(errors.costs[kind], highest)]
        if len(studied) > 1:
            row.append(difference(*(errors.costs[kind] for errors in columns), higher_is_better=False))
        rows.append(row)
    return join([tag("p", what, class_="soft"), table(headings, rows, range(2, len(headings)), class_="errors")])


def _cost(value: float, highest: float) -> Html:
    share = 0.0 if math.isnan(value) else max(0.0, value / highest)
    return tag("td", number(value), class_="number bar", style=f"--v:{share:.3f}")


# ---- confusion


def _confusion(studied: Sequence[Subject]) -> Html:
    what = (
        f"Rows are what is there, columns what it was taken for, by detections with a score of {SCORE:g} or more that "
        f"overlap it by IoU {IOU:g} or more. Colours are shares of a row."
    )
    parts = []
    for subject in studied:
        study = subject.study
        title = f"{subject.name}, " if len(studied) > 1 else ""
        counts, names = study.main.confusion, study.class_names
        drawn = _matrix(counts, names) if len(names) <= LARGEST_MATRIX else _most_confused(counts, names)
        parts.append(tag("div", tag("h3", f"{title}{WORDS[study.main_kind]}s"), drawn))
    return join([tag("p", what, class_="soft"), tag("div", *parts, class_="pictures")])


def _matrix(counts: np.ndarray, names: Sequence[str]) -> Html:
    totals = counts.sum(1).clip(1)
    rows = []
    for i, name in enumerate([*names, tag("i", "nothing there")]):
        cells = [heat(int(count), count / totals[i]) for count in counts[i]]
        rows.append([name, *(cells[:-1] if i == len(names) else cells)])
    return table(["", *names, tag("i", "missed")], rows, class_="confusion")


def _most_confused(counts: np.ndarray, names: Sequence[str]) -> Html:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    there, taken = [*names, "nothing"], [*names, "missed"]
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [np.unravel_index(place, wrong.shape) for place in order]
    rows = [[there[i], taken[j], f"{wrong[i, j]:,}"] for i, j in pairs if wrong[i, j]]
    return table(["what is there", "what it was taken for", "how often"], rows, [2])


# ---- images


def _images(studied: Sequence[Subject]) -> Html:
    meaning = (
        f"Quality is panoptic quality of one image: the IoUs of the objects found with their class (from {IOU:g}), "
        f"over found + (missed + wrong) / 2; detections with a score of {SCORE:g} or more are drawn and counted."
    )
    text = tag("p", meaning, class_="soft")
    if len(studied) == 1:
        subject = studied[0]
        qualities = subject.study.main.qualities
        pictures = Pictures([subject.study], [subject.name])
        worst = qualities[:SHOWN]
        best = qualities[len(worst) :][-SHOWN:][::-1]
        groups = {"The worst": worst, "The best": best}
        drawn = {title: [pictures.row(q.image_id, q) for q in chosen] for title, chosen in groups.items()}
    else:
        if reason := _not_of_one_data_set(*(subject.study.dataset for subject in studied)):
            return tag("p", f"The two {reason}, so none are shown side by side.")
        first, second = (_by_id(subject.study.main) for subject in studied)
        pictures = Pictures([subject.study for subject in studied], [subject.name for subject in studied])
        both = sorted(first.keys() & second.keys(), key=lambda key: second[key].quality - first[key].quality)
        lower = [key for key in both if second[key].quality < first[key].quality][:SHOWN]
        higher = [key for key in both[::-1] if second[key].quality > first[key].quality][:SHOWN]
        groups = {f"{studied[1].name} does better": higher, f"{studied[0].name} does better": lower}
        drawn = {title: [pictures.row(key, first[key], second[key]) for key in keys] for title, keys in groups.items()}
    parts = [
        part for title, rows in drawn.items() if rows for part in (tag("h3", title), tag("div", *rows, class_="rows"))
    ]
    return join([text, *parts])


def _by_id(part: KindStudy) -> dict[int, ImageQuality]:
    return {quality.image_id: quality for quality in part.qualities}


def _not_of_one_data_set(first: AnnotatedImages, second: AnnotatedImages) -> str | None:
    """Why what was found in images of the one cannot be drawn on those of the other; None: it can.

    Equal ids say little: most data sets count from 1.
    """
    images = [{dataset.image_info(index) for index in range(len(dataset))} for dataset in (first, second)]
    if images[0] != images[1]:
        return "were evaluated on different images"
    classes = [list(zip(dataset.category_ids, dataset.class_names, strict=True)) for dataset in (first, second)]
    return "have other categories" if classes[0] != classes[1] else None
