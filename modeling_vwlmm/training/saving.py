# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""Saving and resuming of a trainer: checkpoints that are whole or not there, and know what they are of."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from .checkpoints import (
    INCOMPLETE,
    RUN_STATE,
    StopSignals,
    TrainingInterrupted,
    check_run,
    describe_data,
    describe_run,
    find_last_checkpoint,
    publish_checkpoint,
    remove_incomplete_checkpoints,
)
from .training_modules import load_training_modules, save_training_modules
from .watching import Stopwatch


logger = logging.get_logger(__name__)


class SavesWholeCheckpoints:
    """The part of a trainer that saves and resumes."""

    def _prepare_run(self, model: nn.Module, train_dataset: Dataset | IterableDataset | None) -> None:
        self._base_model, self._config, self._data = model, model.config, describe_data(train_dataset)
        self._num_steps_taken, self._is_saving = 0, False
        self._stop_signals, self._stop_votes, self._stops = StopSignals(), None, False
        self._stopwatch = Stopwatch()
        self._forget_steps()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        See `Trainer.train`. Once the stage of a model has ended, it stands in `config.trained_stages`.

        Raises:
            ValueError: If the checkpoint to resume from is not whole, of another stage, method or model, or of other
                data (without `ignore_data_changes`).
            TrainingInterrupted: If SIGTERM or SIGUSR1 came, and a checkpoint has been saved. As a `SystemExit` it ends
                the process with code 143.
        """
        self._has_recorded_stage = False
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        self.remove_callback(RunStateCallback)
        self.add_callback(RunStateCallback(self, checkpoint))
        self._forget_steps()
        with self._stop_signals:
            output = super().train(checkpoint, *args, **kwargs)
        if self._stops and self.state.global_step < self.state.max_steps:
            raise TrainingInterrupted(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"))
        self._record_stage()
        return output

    def _record_stage(self) -> None:
        """Writes into the config that the stage has ended."""

    def _find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        self._num_steps_taken, self._stops = 0, False
        if self.args.should_save:
            remove_incomplete_checkpoints(self.args.output_dir)
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = find_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no whole checkpoint to resume from.")
        if checkpoint is not None:
            check_run(checkpoint, self._describe_run(), self.args.ignore_data_changes)
            if not self.args.ignore_data_skip:
                state = TrainerState.load_from_json(Path(checkpoint, TRAINER_STATE_NAME))
                self._num_steps_taken = state.global_step
        return checkpoint

    def _describe_run(self) -> dict[str, dict[str, Any]]:
        return describe_run(self.args, self._config, self._data, uses_peft=is_peft_model(self.model))

    def _get_output_dir(self, trial: Any) -> str:
        # Private, as is all saving: where a checkpoint is written until all of it is there.
        folder = super()._get_output_dir(trial)
        return str(Path(folder, INCOMPLETE)) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Private, as is all saving.
        output_dir, step = Path(self._get_output_dir(trial)), self.state.global_step
        if step >= self.state.max_steps:
            self._record_stage()
        name = f"checkpoint-{step}"
        checkpoint, written = output_dir / name, output_dir / INCOMPLETE / name
        best = output_dir / f"checkpoint-{self.state.best_global_step}"
        if self.args.should_save:
            shutil.rmtree(written, ignore_errors=True)
        run_state = {**self._describe_run(), "since_last_log": gather_object([self._get_sums_since_last_log()])}
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step and (best.exists() or best == checkpoint):
            self.state.best_model_checkpoint = str(best)
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if best == checkpoint:
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            publish_checkpoint(written, checkpoint, run_state)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and written.exists():  # of processes whose disk is another
            publish_checkpoint(written, checkpoint, run_state)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Private, as is all saving.
        if not self._is_saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_sums_since_last_log(self) -> dict[str, Any]:
        return {
            "step": self._globalstep_last_logged,
            "loss": self._tr_loss.item(),
            "means": self._means["train"].state_dict(),
        }

    def _set_sums_since_last_log(self, processes: list[dict[str, Any]]) -> None:
        index, is_same_layout = self.accelerator.process_index, len(processes) == self.accelerator.num_processes
        loss = sum(process["loss"] for process in processes) / len(processes)  # of which the mean is logged
        self._globalstep_last_logged = processes[0]["step"]
        self._tr_loss += processes[index]["loss"] if is_same_layout else loss
        mine = processes[index : index + 1] if is_same_layout else [] if index else processes
        self._means["train"].load_state_dict([process["means"] for process in mine])

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        # Private: no public hook sees the weights that sharded training puts together.
        if self.args.should_save:  # before the model's own weights are saved, which takes these out of `state_dict`
            save_training_modules(self._base_model, output_dir or self.args.output_dir, state_dict)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Private, as is all resuming. DeepSpeed has a checkpoint of its own, of all modules, and does not come here.
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_training_modules(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        # Private, as is all resuming.
        super()._load_best_model()
        if not self.is_deepspeed_enabled:
            self._load_training_modules(self.state.best_model_checkpoint)

    def _load_training_modules(self, folder: str) -> None:
        # FSDP's own checkpoints have them, but for those of PEFT, which have adapters alone.
        if not self.is_fsdp_enabled or is_peft_model(self.model):
            load_training_modules(self._base_model, folder)


class RunStateCallback(TrainerCallback):
    """Goes on with the sums since the last log of a resumed run, and ends a run that a signal asks to."""

    def __init__(self, trainer: "SavesWholeCheckpoints", checkpoint: str | None) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_train_begin`."""
        self.trainer._stopwatch.restart(state.global_step)
        if self.checkpoint is not None:
            run_state = json.loads(Path(self.checkpoint, RUN_STATE).read_text())
            self.trainer._set_sums_since_last_log(run_state["since_last_log"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `TrainerCallback.on_step_end`."""
        if self.trainer.accelerator.num_processes == 1:
            self.trainer._stops = self.trainer._stop_signals.received
        if self.trainer._stops:
            logger.warning(f"A signal came: the run saves a checkpoint of step {state.global_step}, and ends.")
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may be little time
