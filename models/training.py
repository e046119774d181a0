"""The training loop: one function, read top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import resource
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from .bad_images import BadImages
from .build import build_from_config
from .checkpoint import class_table, load_backbone, load_weights, save_weights
from .classes import check_same_classes
from .config_files import settings
from .data import AnnotatedImages, Augmentation, PythonDataset, default_dataset, open_dataset, training_loader
from .data.python import PythonData
from .devices import allow_tf32, choose_amp_dtype
from .distributed import (
    World,
    first_on_its_machine,
    max_over_ranks,
    note_for_restarts,
    noted_before_restart,
    on_main,
    own_device,
    share,
    share_buffers,
    world_from_environment,
)
from .errors import UsageError
from .evaluate import evaluate_detector, save_comparison
from .files import make_folder
from .interrupts import StopSignals
from .loss_window import LossWindow, compact_losses
from .optimization import averaged_weights, learning_rate, make_optimizer, scaled
from .progress import MetricsLog, Progress, best_step, evaluations
from .recipes import TrainConfig
from .recomputation import recompute_activations
from .resume import RunFolder, TrainingState
from .starts import note_start
from .training_step import TrainingStep
from .watchdog import Watchdog, watched

NOBODY = Console(file=open(os.devnull, "w"))  # noqa: SIM115 (as long as the process)
"""What the processes beside the main one show their progress to."""


def train(config: TrainConfig, train_set: PythonData | None = None, val_set: PythonData | None = None) -> None:
    """Trains a detector as `config` says and writes weights, metrics and pictures to `config.output`.

    Started by torchrun, all processes of the job train one detector together, and the result is that of one process.

    Args:
        train_set, val_set: data sets written in Python (models/data/python.py says what they have to give), instead of
            the folder `config.data`. Their classes must be the same.

    Raises:
        DataError: the data, the weights or the checkpoint cannot be used; or training has diverged.
        UsageError: the folder holds another run, or the settings do not fit together.
        MachineError: no such device, out of memory, a disk that stays full, processes that do not meet.
    """
    world = world_from_environment()
    parts = world.size * config.accumulate
    if config.batch_size % parts:
        processes = "1 process" if world.size == 1 else f"{world.size} processes"
        why = f"{parts} parts: {processes} times --accumulate {config.accumulate}"
        fix = f"--batch-size {-(-config.batch_size // parts) * parts}"
        raise UsageError("the images of a step cannot be shared", f"--batch-size {config.batch_size}", why, fix)
    device = own_device(config.device, world)
    with watched(world, device, config.rank_timeout) as watchdog:
        train_together(scaled(config), world, device, train_set, val_set, watchdog)


def train_together(
    config: TrainConfig, world: World, device: torch.device, train_set, val_set, watchdog: Watchdog
) -> None:
    """`train` in each process of a job. The main one writes and talks; the others only compute."""
    config = dataclasses.replace(config, resume=is_continued(config))
    with first_on_its_machine(world):
        train_set, val_set = open_data(config, train_set, val_set)
    check_same_classes(
        "the training and the validation annotations have different classes",
        ("training", train_set.class_names, train_set.category_ids),
        ("validation", val_set.class_names, val_set.category_ids),
        where=train_set.root,
        fix="give both the same categories",
    )
    config = fit_to_data(config, train_set)
    output = Path(on_main(lambda: make_folder(config.output)))

    torch.manual_seed(config.seed)
    detector = build_from_config(config.arch, config.detector).to(device).train()
    if config.tf32:
        allow_tf32()
    if config.weights and not config.resume:
        check_weights_classes(config.weights, train_set)
        load_weights(detector, config.weights)
    if config.backbone_weights and not config.resume:
        load_backbone(detector.backbone, config.backbone_weights)
    averaged = averaged_weights(detector, config.ema_decay) if config.ema_decay else None
    if config.checkpoint_activations:
        recompute_activations(detector)
    amp_dtype = choose_amp_dtype(config.amp, device)
    # Only float16 needs its gradients scaled away from zero; bfloat16 has float32's range.
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    window = LossWindow()
    state = TrainingState(detector, make_optimizer(config, detector), scaler, averaged, window, device)

    loader = make_loader(config, train_set, device, world)
    steps_per_epoch = len(loader) // config.accumulate
    total = config.epochs * steps_per_epoch
    if config.max_iterations is not None:
        total = min(total, config.max_iterations)

    with (
        StopSignals() as stop,
        RunFolder(config, output, train_set) as run,
        Progress("train", total, "steps", run.first_step, console=None if world.main else NOBODY) as progress,
    ):
        iteration = run.first_step
        if run.checkpoint is not None:
            state.restore(run.checkpoint)
            run.checkpoint = None  # its memory is free for the run
        if iteration > total:
            raise UsageError(
                "the run is longer already",
                where=f"--max-iterations {config.max_iterations}",
                why=f"{iteration} steps are made",
                fix="a larger number, or none",
            )
        make_step = TrainingStep(config, output, state, world, amp_dtype, watchdog.note)
        log = MetricsLog(output, resume_step=iteration if config.resume else None) if world.main else None
        bad_images = BadImages(output, len(train_set), progress.print if world.main else print)
        if world.main:
            note_for_restarts(str(output.resolve()))
            note_start(output, device, iteration, train_set, val_set)
            describe_run(config, detector, train_set, val_set, device, world, total, iteration)
        while True:
            watchdog.note(iteration, "waiting")  # for the main process's answer, and its buffers
            # A run may have been stopped between a checkpoint and its evaluation.
            if evaluation_is_due(config, iteration, steps_per_epoch, total) and share(
                world.main and iteration not in evaluations(log.path)
            ):
                stop.at_once()
                start = time.monotonic()
                note = functools.partial(watchdog.note, iteration)
                share_buffers(state.result)  # which learned from the images of each process, and are saved from one
                evaluate(config, state.result, val_set, output, log, iteration, progress, world, note)
                note("evaluating" if world.main else "waiting")
                window.leave_out(time.monotonic() - start)
            if iteration == total:
                break
            epoch, first_step = divmod(iteration, steps_per_epoch)
            loader.set_epoch(epoch, first_step * config.accumulate)
            stop.after_step()
            batches = iter(loader)
            while True:
                watchdog.note(iteration + 1, "loading")
                parts = list(itertools.islice(batches, config.accumulate))
                if not parts:
                    break
                for batch in parts:
                    bad_images.note(batch.broken)
                rate = learning_rate(config, iteration, steps_per_epoch)
                values, must_stop = make_step(iteration + 1, rate, parts, stop)
                iteration += 1
                window.add(values, images=config.batch_size)

                if iteration % config.log_every == 0 or iteration == total:
                    means = window.means()
                    watchdog.note(iteration, "all-reduce")
                    memory = max_over_ranks(memory_peak(device))
                    if world.main:
                        log.write(
                            iteration,
                            means | {"learning_rate": rate, "epoch": iteration / steps_per_epoch, "memory_gib": memory},
                        )
                    progress.advance(
                        iteration - progress.done,
                        epoch=f"{epoch + 1}/{config.epochs}",
                        loss=means["loss"],
                        speed=f"{means['images_per_second']:.1f} images/s",
                        memory=f"{memory:.2f} GiB",
                        details=compact_losses(means),
                    )
                must_save = iteration == total or must_stop
                if must_save or checkpoint_is_due(config, iteration, steps_per_epoch):
                    if world.main:
                        log.sync()  # first, so that a checkpoint never knows of more than its log
                    position = {
                        "seed": config.seed,
                        "epoch": epoch,
                        "batches_done": iteration - epoch * steps_per_epoch,
                    }
                    watchdog.note(iteration, "saving" if world.main else "waiting")
                    run.save(iteration, state, position, best_step(log.path) if world.main else None, must_save)
                if must_stop:
                    stop.end(iteration)
                if iteration == total:
                    break
        if world.main:
            log.close()
    if world.main:
        print(f"weights: {output / 'weights.safetensors'}\npictures: {output / 'detections.png'}")


def checkpoint_is_due(config: TrainConfig, iteration: int, steps_per_epoch: int) -> bool:
    """Before each evaluation, too: a signal ends one at once, since nothing is lost then."""
    epoch, inside = divmod(iteration, steps_per_epoch)
    steps, evaluations = config.checkpoint_every_steps, config.evaluate_every
    at_epoch = epoch % config.checkpoint_every == 0 or (evaluations > 0 and epoch % evaluations == 0)
    return (not inside and at_epoch) or (steps > 0 and iteration % steps == 0)


def evaluation_is_due(config: TrainConfig, iteration: int, steps_per_epoch: int, total: int) -> bool:
    epoch, inside = divmod(iteration, steps_per_epoch)
    every = config.evaluate_every
    return iteration > 0 and (iteration == total or (every > 0 and not inside and epoch % every == 0))


def fit_to_data(config: TrainConfig, dataset: AnnotatedImages) -> TrainConfig:
    """The configuration with the data's numbers of classes, and the semantic branch only if there are maps for it."""
    fields: dict = {"num_classes": dataset.num_classes}
    if hasattr(config.detector, "semantic"):
        fields["semantic"] = dataset.has_semantic
        fields["num_semantic_classes"] = dataset.num_semantic_classes or config.detector.num_semantic_classes
    detector = dataclasses.replace(config.detector, **fields)
    return dataclasses.replace(config, detector=detector)


def open_data(config: TrainConfig, train_set: PythonData | None, val_set: PythonData | None):
    """(training, validation) data: what was given, or the folder that the configuration names."""
    if (train_set is None) != (val_set is None):
        raise UsageError("train_set and val_set go together", where="models.train", fix="give both, or neither")
    if train_set is not None:
        if config.data is not None:
            raise UsageError("there are two kinds of data", where=f"data={config.data} and train_set", fix="give one")
        return PythonDataset(train_set, "train_set", training=True), PythonDataset(val_set, "val_set")
    root = config.data or default_dataset()
    semantic = config.semantic if hasattr(config.detector, "semantic") else "no"
    boxes_only = config.arch == "faster_rcnn"
    train_set = open_dataset(root, config.train_split, semantic=semantic, training=True, boxes_only=boxes_only)
    return train_set, open_dataset(root, config.val_split, semantic="no", boxes_only=boxes_only)


def check_weights_classes(path: Path, dataset) -> None:
    """Fine-tuning keeps the heads, so the classes of a weights file that names its own must be those of the data."""
    classes = class_table(path)
    if classes is not None:
        check_same_classes(
            "the weights know other classes than the data",
            ("weights", *classes),
            ("data", dataset.class_names, dataset.category_ids),
            where=f"{path} and {dataset.annotation_file}",
            fix="to start from the backbone alone, which knows no classes: --backbone-weights instead of --weights",
        )


def make_loader(config: TrainConfig, dataset: AnnotatedImages, device: torch.device, world: World):
    return training_loader(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
        rank=world.rank,
        world=world.size,
        parts=config.accumulate,
        resize=config.resize,
        augmentation=Augmentation(
            flip=config.flip,
            short_sides=range(config.short_sides[0], config.short_sides[1] + 1) if config.short_sides else (),
            scale=config.scale_jitter,
            colour=config.colour_jitter,
        ),
        semantic_padding=config.semantic_padding,
        raw=device.type == "cuda",  # a GPU resizes and normalises in less time than it takes to send it the floats
        substitute=config.on_bad_image == "substitute",
    )


def memory_peak(device: torch.device) -> float:
    """Peak memory in GiB: of CUDA's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_continued(config: TrainConfig) -> bool:
    """Whether there is a run to go on with: --resume, or torchrun has started the job again, after a process of it had
    ended. (Of several machines, it tells only those of that process.)"""
    restarts = max_over_ranks(float(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    return on_main(lambda: config.resume or (restarts > 0 and noted_before_restart(str(Path(config.output).resolve()))))


def evaluate(
    config,
    detector,
    dataset,
    output: Path,
    log: MetricsLog | None,
    iteration: int,
    progress: Progress,
    world: World,
    note: Callable[[str], None],
) -> None:
    """AP on the validation images, the weights file with it, and a picture of detections beside the ground truth."""
    num_images = min(len(dataset), config.max_evaluation_images or len(dataset))
    progress.print(f"step {iteration}: evaluating on {num_images} images")
    with Progress("evaluate", num_images, "images", inside=progress) as part:
        metrics = evaluate_detector(
            detector,
            dataset,
            batch_size=config.batch_size // (world.size * config.accumulate),
            resize=config.resize,
            max_images=config.max_evaluation_images,
            progress=part,
            results_folder=output,  # what models.report looks at
            partial=output / "evaluation.partial.jsonl",
            world=world,
            note=note,
        )
    if metrics is None:  # the main process has them
        return
    mask = "" if metrics.mask is None else f"  mask AP {metrics.mask.ap:.3f}"
    voc = "" if metrics.voc is None else f"  VOC mAP {metrics.voc.mean:.3f}"
    progress.print(f"step {iteration}: box AP {metrics.box.ap:.3f}{mask}{voc}")
    save_weights(
        output / "weights.safetensors",
        detector,
        dataset.class_names,
        dataset.category_ids,
        {"metrics": metrics.flat(), "resize": config.resize, "iteration": iteration},
    )
    picture = save_comparison(detector, dataset, output / "detections.png", resize=config.resize)
    log.picture(iteration, "detections", picture)
    log.write(iteration, metrics.flat())  # last: the line says that the evaluation is complete


def describe_run(config, detector, train_set, val_set, device, world: World, total: int, iteration: int) -> None:
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    title = " (sample-consistency detector)" if config.arch == "scnet" else ""  # not the backbones of that name
    where = f"{device}" if world.size == 1 else f"{world.size} processes, each on its {device.type}"
    print(
        f"{config.arch}{title}, {parameters / 1e6:.1f} M parameters, on {where}\n"
        f"data    {train_set.root}: {len(train_set)} training and {len(val_set)} validation images, "
        f"{train_set.num_classes} classes, semantic maps {'yes' if train_set.has_semantic else 'no'}\n"
        f"run     {config.output}: {total} steps of {config.batch_size} images"
        + (f", continued after step {iteration}" if iteration else "")
        + "\n"
        + textwrap.fill("settings  " + "  ".join(settings(config)), 120, subsequent_indent="        "),
        flush=True,
    )
    for kind, left_out in (("annotations", train_set.objects_left_out), ("images", train_set.images_left_out)):
        if left_out:
            reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
            print(f"        not trained on: {sum(left_out.values())} {kind} ({reasons})", flush=True)
