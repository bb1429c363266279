"""Draws a study into a folder, in a process of its own that leaves the processor to the training.

Plots, analyses of importance and pictures are seconds of pure computing. In the worker they would take turns with the
thread that answers the trainer; a process of the lowest priority does not, and its memory goes with it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from search.review import StudyData
from yolocore.details import EvaluationDetails, load_details
from yolocore.errors import CheckpointError

LOWEST_PRIORITY = 19
STUDY, TRIALS = "study", "trials"
"""Folders of what was drawn: of the study, and below `trials` by ticket id."""

NOTE_FILE = "note.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderJob:
    """What to draw, and where."""

    data: StudyData
    hyp: str | None
    """Text of the best hyp YAML."""
    folder: Path
    pictures: Mapping[int, Path] = field(default_factory=dict)
    """Details of an evaluation by ticket id, of the trials that get pictures."""


def start(job: RenderJob, priority: int = LOWEST_PRIORITY) -> BaseProcess:
    """Starts to draw, with that much less priority; the process ends with code 0 once everything is in the folder."""
    process = multiprocessing.get_context("spawn").Process(target=render, args=(job,), name="render", daemon=True)
    process.start()
    assert process.pid is not None
    if priority:
        with suppress(ProcessLookupError, PermissionError):
            own = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, process.pid, min(LOWEST_PRIORITY, own + priority))
    return process


def render(job: RenderJob) -> None:
    """Draws everything; files appear in the job's folder."""
    _render_study(job)
    for ticket_id, file in job.pictures.items():
        with suppress(CheckpointError):  # a damaged file: a trial without pictures
            _render_trial(job, ticket_id, load_details(file))


def _render_study(job: RenderJob) -> None:
    from search.note import note
    from search.page import Review, plot_page, report_page

    folder = job.folder / STUDY
    (folder / "plots").mkdir(parents=True)
    review = Review.of(job.data)
    for number, plot in enumerate(review.plots, start=1):
        # Numbered, since MLflow sorts artifacts by name; by its place among all plots, since a plot that changed its
        # number would lie there twice.
        if plot.figure is not None:
            page = plot_page(plot, job.data.config.name)
            (folder / "plots" / f"{number:02d}-{plot.key}.html").write_text(page, encoding="utf-8")
    (folder / "report.html").write_text(report_page(review, job.hyp), encoding="utf-8")
    (folder / NOTE_FILE).write_text(note(job.data, review.found, review.plots), encoding="utf-8")


def _render_trial(job: RenderJob, ticket_id: int, details: EvaluationDetails) -> None:
    from search.pictures import draw_pictures

    data = job.data
    ticket = next(ticket for ticket in data.tickets if ticket.id == ticket_id)
    if details.epoch != ticket.best_epoch:
        return  # of another attempt
    is_base = data.base is not None and data.base.id == ticket_id
    title = f"base (trial {ticket.trial_number})" if is_base else f"trial {ticket.trial_number}"
    folder = job.folder / TRIALS / str(ticket_id) / "pictures"
    folder.mkdir(parents=True)
    base = {} if is_base or data.base is None else data.class_ap(data.base)
    draw_pictures(details, data.class_names, title, base, folder)
