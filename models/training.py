"""The training loop: one function, read top to bottom."""

from __future__ import annotations

import dataclasses
import math
import resource
import textwrap
import time
from pathlib import Path

import torch

from .bad_images import BadImages
from .build import build_from_config
from .checkpoint import class_table, load_backbone, load_weights, save_weights
from .classes import check_same_classes
from .config_files import settings
from .data import AnnotatedImages, Augmentation, PythonDataset, default_dataset, open_dataset, training_loader
from .data.python import PythonData
from .devices import allow_tf32, choose_amp_dtype, choose_device
from .errors import UsageError
from .evaluate import evaluate_detector, save_comparison
from .files import make_folder
from .interrupts import StopSignals
from .loss_window import LossWindow
from .out_of_memory import explained_memory
from .progress import MetricsLog, Progress, best_step, evaluations
from .recipes import TrainConfig
from .recomputation import recompute_activations
from .replay import check_finite
from .resume import RunFolder, TrainingState, random_state
from .sessions import note_session


def train(config: TrainConfig, train_set: PythonData | None = None, val_set: PythonData | None = None) -> None:
    """Trains a detector as `config` says and writes weights, metrics and pictures to `config.output`.

    Args:
        train_set, val_set: data sets written in Python (models/data/python.py says what they have to give), instead of
            the folder `config.data`. Their classes must be the same.

    Raises:
        DataError: the data, the weights or the checkpoint cannot be used. UsageError: the folder holds another run.
    """
    device = choose_device(config.device)
    train_set, val_set = open_data(config, train_set, val_set)
    check_same_classes(
        "the training and the validation annotations have different classes",
        ("training", train_set.class_names, train_set.category_ids),
        ("validation", val_set.class_names, val_set.category_ids),
        where=train_set.root,
        fix="give both the same categories",
    )
    config = fit_to_data(config, train_set)
    output = make_folder(config.output)

    torch.manual_seed(config.seed)
    detector = build_from_config(config.arch, config.detector).to(device).train()
    if config.tf32:
        allow_tf32()
    if config.checkpoint_activations:
        recompute_activations(detector)
    if config.weights and not config.resume:
        check_weights_classes(config.weights, train_set)
        load_weights(detector, config.weights)
    if config.backbone_weights and not config.resume:
        load_backbone(detector.backbone, config.backbone_weights)
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config, detector)
    amp_dtype = choose_amp_dtype(config.amp, device)
    # Only float16 needs its gradients scaled away from zero; bfloat16 has float32's range.
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    window = LossWindow()
    state = TrainingState(detector, optimizer, scaler, window, device)

    loader = make_loader(config, train_set, device)
    steps_per_epoch = len(loader)
    total = config.epochs * steps_per_epoch
    if config.max_iterations is not None:
        total = min(total, config.max_iterations)

    with (
        StopSignals() as stop,
        RunFolder(config, output, train_set) as run,
        Progress("train", total=total, unit="steps", done=run.first_step) as progress,
    ):
        iteration = run.first_step
        if run.checkpoint is not None:
            state.restore(run.checkpoint)
        log = MetricsLog(output, resume_step=iteration if config.resume else None)
        note_session(output, device, iteration)
        bad_images = BadImages(output, len(train_set), progress.print)
        describe_run(config, detector, train_set, val_set, device, total, iteration)
        while True:
            stop.at_once()
            # A run may have been stopped between a checkpoint and its evaluation.
            if evaluation_is_due(config, iteration, steps_per_epoch, total) and iteration not in evaluations(log.path):
                start = time.monotonic()
                evaluate(config, detector, val_set, output, log, iteration, progress)
                window.leave_out(time.monotonic() - start)
            if iteration == total:
                break
            epoch, start_batch = divmod(iteration, steps_per_epoch)
            loader.set_epoch(epoch, start_batch)
            stop.after_step()
            for batch in loader:
                bad_images.note(batch.broken)
                batch = batch.to(device).prepared()
                rate = learning_rate(config, iteration, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["multiple"]
                optimizer.zero_grad(set_to_none=True)  # now, not after the losses: their memory is free for activations
                random = random_state(device)
                with explained_memory(iteration + 1, batch, detector, optimizer):
                    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                        losses = detector.losses(
                            batch.images,
                            batch.image_sizes,
                            batch.gt_boxes,
                            batch.gt_labels,
                            batch.gt_masks,
                            batch.semantic,
                        )
                        loss = sum(losses.values())
                    scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                limit = config.clip_gradient_norm or math.inf
                norm = torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
                values = losses | {"loss": loss}
                # In float16 the gradient may overflow: the scaler leaves such a step out and scales less.
                finite = values if amp_dtype is torch.float16 else values | {"gradient_norm": norm}
                check_finite(config, output, iteration + 1, finite, detector, batch, random)
                scaler.step(optimizer)
                scaler.update()
                iteration += 1
                window.add(values | {"gradient_norm": norm}, images=len(batch.images))

                if iteration % config.log_every == 0 or iteration == total:
                    means = window.means()
                    memory = memory_peak(device)
                    log.write(
                        iteration,
                        means | {"learning_rate": rate, "epoch": iteration / steps_per_epoch, "memory_gib": memory},
                    )
                    progress.advance(
                        iteration - progress.done,
                        loss=means["loss"],
                        speed=f"{means['images_per_second']:.1f} images/s",
                        gradient_norm=means["gradient_norm"],
                        memory=f"{memory:.2f} GiB",
                    )
                must_save = iteration == total or stop.asked is not None
                if must_save or checkpoint_is_due(config, iteration, steps_per_epoch):
                    log.sync()  # first, so that a checkpoint never knows of more than its log
                    position = {
                        "seed": config.seed,
                        "epoch": epoch,
                        "batches_done": iteration - epoch * steps_per_epoch,
                    }
                    run.save(iteration, state, position, best_step(log.path), must_save)
                stop.end_if_asked(iteration)
                if iteration == total:
                    break
        log.close()
    print(f"weights: {output / 'weights.safetensors'}\npictures: {output / 'detections.png'}")


def checkpoint_is_due(config: TrainConfig, iteration: int, steps_per_epoch: int) -> bool:
    epoch, inside = divmod(iteration, steps_per_epoch)
    steps = config.checkpoint_every_steps
    return (not inside and epoch % config.checkpoint_every == 0) or (steps > 0 and iteration % steps == 0)


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


def make_optimizer(config: TrainConfig, detector: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD. Biases are those that are called so: the shift of a norm, too (as in maskrcnn-benchmark)."""
    trained = [(name, parameter) for name, parameter in detector.named_parameters() if parameter.requires_grad]
    decay = config.weight_decay if config.bias_weight_decay is None else config.bias_weight_decay
    if (config.bias_learning_rate, decay) == (1.0, config.weight_decay):
        groups = [{"params": [parameter for _, parameter in trained], "multiple": 1.0}]
    else:
        biases = {"multiple": config.bias_learning_rate, "weight_decay": decay}
        groups = [
            {"params": [parameter for name, parameter in trained if "bias" not in name], "multiple": 1.0},
            {"params": [parameter for name, parameter in trained if "bias" in name], **biases},
        ]
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, foreach=True
    )


def learning_rate(config: TrainConfig, iteration: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a tenth less at each decay epoch."""
    decays = sum(iteration >= epoch * steps_per_epoch for epoch in config.decay_epochs)
    start = config.warmup_start
    warmup = min(1.0, start + (1 - start) * iteration / max(config.warmup_iterations, 1))
    return config.learning_rate * warmup * 0.1**decays


def make_loader(config: TrainConfig, dataset: AnnotatedImages, device: torch.device):
    return training_loader(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.workers,
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


def evaluate(config, detector, dataset, output: Path, log: MetricsLog, iteration: int, progress: Progress) -> None:
    """AP on the validation images, the weights file with it, and a picture of detections beside the ground truth."""
    num_images = min(len(dataset), config.max_evaluation_images or len(dataset))
    progress.print(f"step {iteration}: evaluating on {num_images} images")
    metrics = evaluate_detector(
        detector,
        dataset,
        batch_size=config.batch_size,
        resize=config.resize,
        max_images=config.max_evaluation_images,
        results_folder=output,  # what models.report looks at
        partial=output / "evaluation.partial.jsonl",
    )
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


def describe_run(config, detector, train_set, val_set, device, total: int, iteration: int) -> None:
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    title = " (sample-consistency detector)" if config.arch == "scnet" else ""  # not the backbones of that name
    print(
        f"{config.arch}{title}, {parameters / 1e6:.1f} M parameters, on {device}\n"
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
