"""What a run goes on from: everything that a step changes or depends on, into a checkpoint and out of it again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from .checkpoints import Checkpoint, checkpoint_folders, newest_checkpoint, prune, write_checkpoint
from .classes import check_same_classes
from .config_files import as_json, check_same_settings, read_config
from .distributed import gather, on_main, rank_of_this_process, share_tensors, together
from .errors import DataError, MachineError, UsageError
from .files import write_json
from .loss_window import LossWindow
from .recipes import TrainConfig
from .replay import diverged
from .run_folder import owned_folder
from .silent_faults import bits_of, check_same_weights
from .starts import versions

MOST_FAILED_SAVES = 3
"""In a row; a run that can no longer save is told to stop."""
PARTS = {"config", "counts", "data", "optimizer_groups", "sampler", "scaler", "versions", "window"}
"""That a checkpoint has beside its tensors."""
STATE = ("detector", "optimizer", "averaged", "random", "window")
"""What its tensors belong to."""


@dataclasses.dataclass
class TrainingState:
    """All that a step changes. Data order, augmentation and learning rate are functions of the seed and the step."""

    detector: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    averaged: AveragedModel | None
    window: LossWindow
    device: torch.device

    @property
    def result(self) -> torch.nn.Module:
        """The detector that is evaluated and written: with the average of the weights, where there is one."""
        return self.detector if self.averaged is None else self.averaged.module

    def capture(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors by name, facts that JSON holds). All processes of a job are needed: each has random numbers."""
        optimizer = self.optimizer.state_dict()
        tensors = {f"detector/{name}": value for name, value in self.detector.state_dict().items()}
        for index, entries in optimizer["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in entries.items() if value is not None}
        if self.averaged is not None:
            tensors |= {f"averaged/{name}": value for name, value in self.averaged.state_dict().items()}
        for rank, generators in enumerate(gather(_random_state(self.device)) or []):
            names = {f"random/{rank}/{name}": numbers for name, numbers in generators.items()}
            tensors |= {name: torch.tensor(numbers, dtype=torch.uint8) for name, numbers in names.items()}
        tensors |= {f"window/{name}": value for name, value in self.window.sums.items()}
        facts = {
            "counts": _counts(tensors),
            "optimizer_groups": optimizer["param_groups"],
            "scaler": self.scaler.state_dict(),
            "window": {"steps": self.window.steps},
        }
        return tensors, facts

    def common(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of `capture` that are the same in all processes of a job. Batch norms may learn statistics of their
        own, in buffers."""
        names = {f"detector/{name}" for name, _ in self.detector.named_parameters()}
        if self.averaged is not None:
            names |= {f"averaged/{name}" for name, _ in self.averaged.named_parameters()}
        return {name: value for name, value in tensors.items() if name in names or name.startswith("optimizer/")}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Raises DataError if a part is missing or belongs to something else."""
        _, tensors, facts = checkpoint
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in STATE}
        if _counts(tensors) != facts["counts"]:
            why = f"it has {_counts(tensors)} tensors, and was made of {facts['counts']}"
            raise DataError("the checkpoint lacks a part", why=why)
        try:
            for name, value in tensors.items():
                part, _, rest = name.partition("/")
                parts[part][rest] = value
            self.detector.load_state_dict(parts["detector"])
            entries: dict[int, dict[str, Tensor]] = {}
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            for name, value in parts["optimizer"].items():
                index, _, entry = name.partition("/")
                parameter = parameters[int(index)]
                if value.shape == parameter.shape:  # the order of its elements in memory, too, as it was
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                entries.setdefault(int(index), {})[entry] = value
            self.optimizer.load_state_dict({"state": entries, "param_groups": facts["optimizer_groups"]})
            self.scaler.load_state_dict(facts["scaler"])
            if self.averaged is not None:
                self.averaged.load_state_dict(parts["averaged"])
            self.window.sums = {name: value.to(self.device) for name, value in parts["window"].items()}
            self.window.steps = facts["window"]["steps"]
            _restore_random_state(parts["random"], self.device)
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise DataError("the checkpoint lacks a part, or is of something else", why=why) from error


class RunFolder:
    """Where a run saves itself, and what it goes on from: `checkpoint`, or None, and `first_step`. Owned inside `with`.

    Args:
        dataset: what it trains on; a checkpoint goes with its images and classes.
        tell: called with a line for a person.

    Raises:
        UsageError: the folder holds another run. DataError: there is nothing to resume, or nothing that is intact.
    """

    def __init__(self, config: TrainConfig, folder: Path, dataset, tell: Callable[[str], None] = print) -> None:
        self.checkpoints, self._folder = folder / "checkpoints", folder
        self._config, self._tell = config, tell
        self._settings = as_json(config)
        self._data = {
            "images": len(dataset),
            "sha256": hashlib.sha256(dataset.sizes.tobytes()).hexdigest(),  # they decide the order
            "class_names": list(dataset.class_names),
            "category_ids": [int(key) for key in dataset.category_ids],
        }
        self._where = dataset.annotation_file
        self._failed = 0
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        with contextlib.ExitStack() as exits:
            found: list[Checkpoint] = []

            def own_and_find() -> dict | None:
                exits.enter_context(owned_folder(self._folder))
                found.extend(filter(None, [self._start_or_resume()]))
                return {"step": found[0].step, "facts": found[0].facts} if found else None

            facts = on_main(own_and_find)
            self.checkpoint = None
            if facts is not None:
                self.checkpoint = Checkpoint(tensors=share_tensors(found[0].tensors if found else None), **facts)
            self._exits = exits.pop_all()
        self.first_step = 0 if self.checkpoint is None else self.checkpoint.step
        self._saved_step = self.first_step
        return self

    def __exit__(self, *_) -> None:
        self._exits.close()

    def _start_or_resume(self) -> Checkpoint | None:
        settings = self._folder / "config.json"
        if not self._config.resume:
            if checkpoint_folders(self.checkpoints):
                raise UsageError(
                    "the output folder holds a run already",
                    where=self._folder,
                    fix=f"--resume continues it; --output {self._folder}-2 starts another",
                )
            write_json(settings, self._settings)
            return None
        checkpoint = newest_checkpoint(self.checkpoints, self._tell)
        if checkpoint is None and not settings.exists():
            fix = "leave --resume out to start the run"
            raise DataError("there is no checkpoint to resume from", where=self.checkpoints, fix=fix)
        if checkpoint is None:
            check_same_settings(as_json(read_config(settings)), self._config, settings)
            self._tell("the run was stopped before its first checkpoint: it starts again")
            return None
        missing = {part for part in PARTS if not isinstance(checkpoint.facts.get(part), dict | list)}
        if missing:
            raise DataError("the checkpoint lacks parts", where=self.checkpoints, why=", ".join(sorted(missing)))
        check_same_settings(checkpoint.facts["config"], self._config, self.checkpoints)
        self._check_data(checkpoint)
        for name, version in versions().items():
            before = checkpoint.facts["versions"].get(name)
            if before != version:
                self._tell(f"{name} was {before} and is {version} now: the last digits of results may differ")
        return checkpoint

    def save(self, step: int, state: TrainingState, position: dict, best: int | None, must: bool) -> None:
        """Writes the checkpoint of `step`, unless there is one, and removes what --keep-checkpoints does not keep.

        Args:
            position: of the sampler, for a person to read: it follows from the step.
            best: the step that scored best so far, whose checkpoint is kept.
            must: raise where the system refuses to write; else the run is told and goes on, three times in a row.

        All processes of a job are needed; the main one writes.

        Raises:
            MachineError: it could not be written, or the processes' weights differ; earlier checkpoints are intact.
        """
        if step == self._saved_step:
            return
        tensors, facts = state.capture()
        check_finite_weights(step, tensors)
        if together():
            check_same_weights(step, bits_of(state.common(tensors)))
        facts |= {"config": self._settings, "data": self._data, "sampler": position, "versions": versions()}

        def write() -> tuple[bool, int]:
            """(whether it is there now, how many times in a row something was refused)"""
            written = False
            try:
                write_checkpoint(self.checkpoints, step, tensors, facts)
                written = True
                prune(self.checkpoints, self._config.keep_checkpoints, best)
            except MachineError as error:
                if must or self._failed + 1 == MOST_FAILED_SAVES:
                    raise
                self._tell(f"step {step}: {error}\n  training goes on; the next checkpoint is tried at its time")
                return written, self._failed + 1
            return written, 0

        written, self._failed = on_main(write)
        if written:
            self._saved_step = step

    def _check_data(self, checkpoint: Checkpoint) -> None:
        before = checkpoint.facts["data"]
        if not isinstance(before, dict) or before.keys() != self._data.keys():
            raise DataError("the checkpoint does not say what it was trained on", where=self.checkpoints)
        check_same_classes(
            "the run has other classes than the data",
            ("run", before["class_names"], before["category_ids"]),
            ("data", self._data["class_names"], self._data["category_ids"]),
            where=self._where,
            fix="give it the data that it was started with",
        )
        if before != self._data:
            why = f"{before['images']} training images then, {self._data['images']} now, or others, in another order"
            raise DataError("these are not the data that the run was started with", where=self._where, why=why)


def check_finite_weights(step: int, tensors: dict[str, Tensor]) -> None:
    """Raises DataError: a checkpoint of them would take the place of the last one that is of use."""
    # Not the window: in float16 the gradient's norm may be infinite, in a step that is left out.
    weights = ("detector/", "optimizer/", "averaged/")
    numbers = {n: value for n, value in tensors.items() if n.startswith(weights) and value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in numbers.values()]).tolist()
    bad = [name for name, good in zip(numbers, finite, strict=True) if not good]
    if bad:
        error = diverged("the weights are", f"step {step}", [f"{bad[0]} and {len(bad) - 1} more are not finite"])
        error.told_by_another = rank_of_this_process() > 0
        raise error


def _counts(tensors: dict[str, Tensor]) -> dict[str, int]:
    """How many belong to each part. Not every weight has a momentum: some ablations leave weights out of all losses."""
    return dict(Counter(name.partition("/")[0] for name in tensors))


def _random_state(device: torch.device) -> dict[str, list[int]]:
    """Torch's generators are all the randomness that there is beside functions of the seed and the step."""
    state = {"cpu": torch.get_rng_state().tolist()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).tolist()
    return state


def _restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Of this process: state["0/cpu"] belongs to rank 0. A job of more processes than before has new ones."""
    rank = rank_of_this_process()
    if f"{rank}/cpu" in state:
        torch.set_rng_state(state[f"{rank}/cpu"])
    if device.type == "cuda" and f"{rank}/cuda" in state:
        torch.cuda.set_rng_state(state[f"{rank}/cuda"], device)
