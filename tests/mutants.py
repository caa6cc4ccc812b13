# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
Changes to the code that must not pass the tests: `make mutants`.

Each mutant is one edit, made on a copy of the repository, and the tests that have to notice it. Says which survive,
and fails if any does. `python tests/mutants.py NAME...` runs some of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
NUM_WORKERS = 2


@dataclass(frozen=True)
class Mutant:
    """
    Args:
        name: What is wrong with the code.
        file: Where, in `modeling_vwlmm`.
        old, new: The edit. `old` stands there once.
        tests: Files of tests, and after `::` what their names must contain.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


OBJECTIVES, MODEL, TRAINER = "objectives_vwlmm.py", "modeling_vwlmm.py", "training/trainer.py"
DROPPING = "dropping_vwlmm.py"
MUTANTS = [
    # What is predicted, from where.
    Mutant(
        "position n is predicted from itself",
        OBJECTIVES,
        "[positions.to(self.hidden_states.device) - 1]",
        "[positions.to(self.hidden_states.device)]",
        "test_modeling.py::GoldenValues",
    ),
    Mutant(
        "an image token behind padding is supervised",
        OBJECTIVES,
        "        is_supervised[:, 1:] &= attention_mask[:, :-1].bool()\n",
        "        pass\n",
        "test_modeling.py::Positions",
    ),
    Mutant(
        "an image token that opens a packed sample is supervised",
        OBJECTIVES,
        "        is_supervised &= position_ids != 0\n",
        "        pass\n",
        "test_modeling.py::several_samples_in_a_row",
    ),
    Mutant(
        "image positions without a label are supervised",
        OBJECTIVES,
        "masked_scatter(is_image, labels != -100)",
        "masked_scatter(is_image, labels != -101)",
        "test_objectives.py::label",
    ),
    Mutant(
        "a layer is aligned with the position behind it",
        OBJECTIVES,
        "hidden = layer[positions.to(layer.device)]",
        "hidden = layer[positions.to(layer.device) - 1]",
        "test_objectives.py::eature",
    ),
    Mutant(
        "placeholders are supervised as text",
        "training/collating.py",
        '        batch["labels"][batch["input_ids"] == image_token_id] = -100\n',
        "",
        "test_training.py::Prompts or placeholder",
    ),
    Mutant(
        "a placeholder is predicted where labels are the token ids",
        MODEL,
        "replace_placeholders(labels, self.config, token_id=-100)",
        "labels",
        "test_modeling.py::may_be_the_token_ids",
    ),
    # Which weight, over how many.
    Mutant(
        "weights are ignored",
        OBJECTIVES,
        "scales = {name: weights[name] / at_least_one(divisors[name])",
        "scales = {name: 1.0 / at_least_one(divisors[name])",
        "test_objectives.py::Mappings",
    ),
    Mutant(
        "means are over the micro-batch",
        OBJECTIVES,
        "divisors[name] = counts.get(name, term.count if isinstance(term, Term) else len(term.hidden))",
        "divisors[name] = term.count if isinstance(term, Term) else len(term.hidden)",
        "test_training.py::Normalisation",
    ),
    Mutant(
        "no position makes a loss that is no number",
        OBJECTIVES,
        "return count.where(count > 0, 1)",
        "return count",
        "test_modeling.py::VisualLoss or Gradients",
    ),
    Mutant(
        "negative weights are accepted",
        OBJECTIVES,
        "not 0 <= weight < math.inf",
        "not weight < math.inf",
        "test_objectives.py::eight",
    ),
    Mutant(
        "the visual loss of several objectives is not weighted",
        "outputs_vwlmm.py",
        "sum(weights[name] / total_weight * losses[name] for name in visual)",
        "sum(losses[name] for name in visual) / len(visual)",
        "test_objectives.py::",
    ),
    Mutant(
        "accumulation divides losses again",
        TRAINER,
        "    loss_is_scaled_for_ga = True\n",
        "    loss_is_scaled_for_ga = False\n",
        "test_training.py::Normalisation",
    ),
    Mutant(
        "logged sums go on after they are logged",
        "training/means.py",
        "sums, self._sums = self._sums, defaultdict(list)",
        "sums = self._sums",
        "test_training.py::Logs",
    ),
    # Who learns.
    Mutant(
        "features as targets get a gradient",
        OBJECTIVES,
        "targets = targets.detach().float()",
        "targets = targets.float()",
        "test_modeling.py::detached",
    ),
    Mutant(
        "stage III's decoder runs with gradients",
        OBJECTIVES,
        '    teaches = ("vm_head", "adapter", "vision_tower")\n',
        '    teaches = ("vm_head", "adapter", "vision_tower", "decoder")\n',
        "test_modeling.py::Gradients",
    ),
    Mutant(
        "stage III learns text",
        OBJECTIVES,
        "    beside_language = False\n",
        "    beside_language = True\n",
        "test_modeling.py::Gradients or VisualLoss",
    ),
    Mutant(
        "a frozen vision tower keeps activations",
        "vision_vwlmm.py",
        "torch.set_grad_enabled(torch.is_grad_enabled() and learns)",
        "torch.enable_grad()",
        "test_modeling.py::keeps_no_activations",
    ),
    Mutant(
        "a loaded vision tower is not frozen",
        "vision_vwlmm.py",
        "        model.base_model.freeze_encoders()\n",
        "",
        "test_modeling.py::Gradients",
    ),
    Mutant(
        "an unfrozen vision tower does not learn",
        "vision_vwlmm.py",
        "learns = any(parameter.requires_grad for parameter in vision_tower.parameters())",
        "learns = False",
        "test_modeling.py::Gradients",
    ),
    Mutant(
        "the stage's modules are not all frozen or trained",
        "training/stages.py",
        "parameter.requires_grad_(id(parameter) in trained)",
        "parameter.requires_grad_(True)",
        "test_training.py::WhatTrains",
    ),
    # What is computed, and what is not.
    Mutant(
        "stage III without its cut behind the last image token",
        OBJECTIVES,
        '    if "language" not in objectives:\n        columns',
        "    if not objectives:\n        columns",
        "test_modeling.py test_objectives.py::",
    ),
    Mutant(
        "training computes full logits",
        TRAINER,
        "logits_to_keep=0 if return_outputs else torch.empty(0, dtype=torch.long)",
        "logits_to_keep=0",
        "test_training.py test_objectives.py::",
    ),
    Mutant(
        "the model computes full logits beside a visual objective",
        MODEL,
        "if logits_to_keep is None and visual_objective is None:",
        "if logits_to_keep is None:",
        "test_modeling.py::",
    ),
    Mutant(
        "a blank image runs without labels",
        MODEL,
        "        if objectives and images is None:\n",
        "        if images is None:\n",
        "test_objectives.py test_modeling.py::",
    ),
    Mutant(
        "the tower runs on text under DDP",
        TRAINER,
        "return self._tower_learns() or self.is_fsdp_enabled or is_deepspeed_zero3_enabled()",
        "return True",
        "test_distributed.py::",
    ),
    Mutant(
        "the tower does not run on text where parameters are sharded",
        TRAINER,
        "return self._tower_learns() or self.is_fsdp_enabled or is_deepspeed_zero3_enabled()",
        "return self._tower_learns()",
        "test_distributed.py::",
    ),
    Mutant(
        "pseudo image features keep all distributions for backward",
        "visual_words_vwlmm.py",
        "torch.cat([checkpoint(self._mix, chunk, embeddings, temperature, **options) for chunk in chunks])",
        "torch.cat([self._mix(chunk, embeddings, temperature) for chunk in chunks])",
        "test_objectives.py::pseudo",
    ),
    # Temperatures.
    Mutant(
        "a temperature divides in fp16",
        "visual_words_vwlmm.py",
        "logits.float() / temperature",
        "logits / temperature",
        "test_modeling.py::temperature",
    ),
    Mutant(
        "the loss leaves the temperature out",
        "loss_vwlmm.py",
        "        teacher_logits /= teacher_temperature\n",
        "        pass\n",
        "test_loss.py::temperature",
    ),
    Mutant(
        "the kernel normalises by logits without their temperature",
        "kernels_vwlmm.py",
        "_log_normalizer(teacher_row, teacher_scale, num_tokens, tile)",
        "_log_normalizer(teacher_row, 1.0, num_tokens, tile)",
        "test_loss.py::temperature",
    ),
    Mutant(
        "a temperature is checked when a config is made, and not where it is set",
        "configuration_vwlmm.py",
        "if name in TEMPERATURES and not 1e-30",
        'if name in TEMPERATURES and "auto_map" not in self.__dict__ and not 1e-30',
        "test_modeling.py::temperature",
    ),
    # Answers.
    Mutant(
        "what a null list hides is counted",
        "training/answers.py",
        "lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0))\n"
        "    return lists.flatten(), np.repeat(np.arange(len(lists)), lengths)",
        "return lists.flatten(), np.asarray(pc.list_parent_indices(lists))",
        "test_training.py::is_an_answer",
    ),
    Mutant(
        "targets come from pseudo image features",
        "image_features_vwlmm.py",
        "        return VWLMMImageFeaturesOutput(**adapted)\n",
        '        adapted["image_features"] = list(read)\n        return VWLMMImageFeaturesOutput(**adapted)\n',
        "test_modeling.py::GoldenValues or VisualLoss",
    ),
    Mutant(
        "a padded batch goes to attention with its mask, into which the host looks",
        TRAINER,
        'if name != "attention_mask"}',
        "if name}",
        "test_objectives.py::read",
    ),
    Mutant(
        "a loss that is no number trains on",
        "training/watching.py",
        "            if not math.isfinite(value):",
        "            if False:",
        "test_watching.py",
    ),
    Mutant(
        "a loss far outside of its history trains on",
        "training/watching.py",
        "            if self.threshold and value > 0",
        "            if False and value > 0",
        "test_watching.py",
    ),
    Mutant(
        "a filler counts",
        "training/trainer.py",
        '            if batch.pop("is_filler", False):\n                ignore_all_positions(batch)\n',
        '            batch.pop("is_filler", False)\n',
        "test_layouts.py",
    ),
    Mutant(
        "a checkpoint gets its name before it is whole",
        "training/saving.py",
        "        return str(Path(folder, INCOMPLETE)) if self._is_saving else folder",
        "        return folder",
        "test_kills.py",
    ),
    Mutant(
        "another run's checkpoint is resumed",
        "training/saving.py",
        "            check_run(checkpoint, self._describe_run(), self.args.ignore_data_changes)",
        "            pass",
        "test_kills.py",
    ),
    Mutant(
        "sums of a prediction leak into the next evaluation",
        "training/trainer.py",
        '        self._means["eval"] = PositionMeans(self._weights)  # whatever an evaluation that failed has left\n',
        "",
        "test_evaluation.py",
    ),
    Mutant(
        "packed samples see each other through forward",
        "modeling_vwlmm.py",
        '        kwargs |= keep_samples_apart(position_ids, attention_mask, past_key_values, kwargs.get("use_cache"))',
        '        kwargs |= {"attention_mask": attention_mask}',
        "test_inputs.py",
    ),
    Mutant(
        "gradients of two backward passes are the same memory",
        "loss_vwlmm.py",
        "in_place = not torch._C._autograd._get_current_graph_task_keep_graph()",
        "in_place = True",
        "test_objectives.py test_loss.py::retain or twice or backward",
    ),
    Mutant(
        "the head's gradient is summed in 16 bits",
        "loss_vwlmm.py",
        "total = a.new_zeros(len(a), b.shape[1], dtype=dtype)",
        "total = a.new_zeros(len(a), b.shape[1])",
        "test_loss.py::",
    ),
    # Order, packing, resuming.
    Mutant(
        "the sampler's batches are not shuffled",
        "training/sampling.py",
        "order = torch.randperm(len(batches), generator=generator)",
        "order = torch.arange(len(batches))",
        "test_training.py test_objectives.py::roup or shuffle or order",
    ),
    Mutant(
        "samplers are not told the epoch",
        "training/data_loading.py",
        "        self.sampler.set_epoch(int(state.epoch or 0))\n",
        "        pass\n",
        "test_training.py::told_the_epoch",
    ),
    Mutant(
        "the first token of a packed sample is predicted from the sample before",
        "training/collating.py",
        '    batch["labels"][position_ids == 0] = -100\n',
        "",
        "test_training.py::Packing",
    ),
    Mutant(
        "what fills a packed row belongs to its last sample",
        "training/collating.py",
        '        ("labels", batch["labels"], -100),\n',
        '        ("labels", batch["labels"], 0),\n',
        "test_training.py::Packing",
    ),
    Mutant(
        "a sample goes into the row with the most room",
        "training/packing.py",
        "room = length + (enough & -enough).bit_length() - 1",
        "room = length + enough.bit_length() - 1",
        "test_training.py::best_fit",
    ),
    Mutant(
        "packing does not follow the epoch",
        "training/packing.py",
        "np.random.default_rng([seed, epoch])",
        "np.random.default_rng([seed, 0])",
        "test_training.py::Packing",
    ),
    Mutant(
        "a resumed run has new training modules",
        "training/saving.py",
        "        self._load_training_modules(resume_from_checkpoint)\n",
        "",
        "test_objectives.py::resum",
    ),
    Mutant(
        "training modules are saved with the model",
        "training/training_modules.py",
        'ignored | {f"training_modules.{name}" for name in modules.state_dict()}',
        "ignored",
        "test_objectives.py::save or safetensors or folder",
    ),
    Mutant(
        "data without an objective's column are accepted",
        TRAINER,
        "            args.check_columns(dataset)\n",
        "            pass\n",
        "test_objectives.py::column",
    ),
    # Pictures and heads.
    Mutant(
        "the class token is read as a patch",
        "vision_vwlmm.py",
        'selected = [features[:, 1:] if strategy == "default" else features for features in selected]',
        'selected = [features[:, :-1] if strategy == "default" else features for features in selected]',
        "test_modeling.py::GoldenValues",
    ),
    Mutant(
        "images without a placeholder are ignored",
        "placeholders_vwlmm.py",
        "        num_placeholders == num_image_features,\n",
        "        True,\n",
        "test_modeling.py test_generation.py test_llava_equality.py::",
    ),
    Mutant(
        "the VM head keeps its size when tokens are added",
        "visual_words_vwlmm.py",
        "if vm_head.out_features != num_tokens:",
        "if False:",
        "test_modeling.py::Resize",
    ),
    Mutant(
        "nearest tokens by product and not by cosine",
        "visual_words_vwlmm.py",
        "directions = F.normalize(embeddings.float(), dim=-1)",
        "directions = embeddings.float()",
        "test_modeling.py::earest",
    ),
    Mutant(
        "a new adapter of an assembled model is random memory",
        "assembly.py",
        "adapter = make_adapter(config) if adapter is None else adapter",
        'adapter = make_adapter(config).to("meta").to_empty(device="cpu") if adapter is None else adapter',
        "test_modeling.py::fresh or new",
    ),
    # Image tokens that are dropped, and codes.
    Mutant(
        "dropped image tokens stay visible in a cache",
        DROPPING,
        'arguments |= {"attention_mask": all_kept.long(), "position_ids": positions}',
        'arguments |= {"position_ids": positions}',
        "test_lavit.py::Dropped",
    ),
    Mutant(
        "positions count dropped image tokens",
        DROPPING,
        "    if position_ids is None:\n        return before\n",
        "    if position_ids is None:\n        return torch.arange(before.shape[1]).expand_as(before)\n",
        "test_lavit.py::Dropped",
    ),
    Mutant(
        "what stands behind an image is predicted from a dropped token",
        DROPPING,
        "last_kept = first + ((slots - first) * is_kept).cummax(dim=1).values",
        "last_kept = slots",
        "test_lavit.py test_lavit_codes.py::Dropped or Objective",
    ),
    Mutant(
        "rows that share a row of the decoder see each other",
        DROPPING,
        'arguments |= {"position_ids": positions, "past_key_values": None}',
        "pass",
        "test_lavit.py::Dropped",
    ),
    Mutant(
        "a decoder that carries a state reads several samples in a row",
        DROPPING,
        ' and not getattr(decoder, "_is_stateful", False)',
        "",
        "test_lavit.py::Dropped",
    ),
    Mutant(
        "a visual tokenizer is loaded in the dtype of its tower",
        "visual_tokenizer_vwlmm.py",
        "        model.to(dtype).quantizer.float()\n",
        "",
        "test_lavit_training.py::half_precision",
    ),
    Mutant(
        "steps of the selector are compared with those before",
        "training/tokenizer_trainer.py",
        "            self._forget_steps()  # without gradients of the selector\n",
        "            pass\n",
        "test_lavit_training.py::not_compared",
    ),
    Mutant(
        "what had no position has a mean of 0",
        "training/means.py",
        "                continue\n            means = {key: total / num_positions",
        "                num_positions = 1\n            means = {key: total / num_positions",
        "test_objectives.py::no_position",
    ),
    Mutant(
        "the code of the patch just read is learned",
        OBJECTIVES,
        "inputs.at_image_tokens(codes.flatten(), positions) + config.code_offset",
        "inputs.at_image_tokens(codes.flatten(), positions - 1) + config.code_offset",
        "test_lavit_codes.py::Objective",
    ),
    Mutant(
        "dropped image tokens are supervised",
        OBJECTIVES,
        "rows[~torch.isin(rows, dropped)]",
        "rows",
        "test_lavit_codes.py::Objective",
    ),
    Mutant(
        "decisions of the selector have no gradient",
        "visual_tokenizer_vwlmm.py",
        "(soft - soft.detach())",
        "0 * soft",
        "test_lavit.py::equation_4",
    ),
    Mutant(
        "the selector goes on learning beside a codebook",
        "training/tokenizer_trainer.py",
        "        self._tokenizer.selector.requires_grad_(not self.has_codebook)\n",
        "",
        "test_lavit_training.py::phases",
    ),
    Mutant(
        "the codebook never moves",
        "training/tokenizer_trainer.py",
        "self.trainer._tokenizer.quantizer.update(self.trainer.make_generator(state.global_step))",
        "pass",
        "test_lavit_training.py::phases",
    ),
    # High-resolution patches.
    Mutant(
        "an image attends to the padding of its patches",
        "adapters_vwlmm.py",
        "logits.masked_fill(~is_key, -torch.inf).softmax(dim=-1)",
        "logits.softmax(dim=-1)",
        "test_sa_perceiver.py::padding_of_a_batch",
    ),
    Mutant(
        "where a patch is does not count",
        "adapters_vwlmm.py",
        "            logits = logits + bias\n",
        "            pass\n",
        "test_sa_perceiver.py::order_of_patches",
    ),
    Mutant(
        "a new perceiver changes what the decoder reads",
        "adapters_vwlmm.py",
        "        nn.init.zeros_(self.w_o1.weight)\n",
        "",
        "test_sa_perceiver.py::FreshPerceiver",
    ),
    Mutant(
        "Transformers begins a perceiver that a checkpoint lacks",
        "image_features_vwlmm.py",
        "            module.init_parameters()\n",
        "            pass\n",
        "test_sa_perceiver.py::FreshPerceiver",
    ),
    Mutant(
        "patches are counted as images",
        TRAINER,
        'return find_snapshots(batch["patch_boxes"]).sum()',
        'return len(batch["patch_boxes"])',
        "test_sa_perceiver.py::counted",
    ),
]


def run(mutant: Mutant) -> str:
    """Makes the edit on a copy, and says whether its tests notice: `"killed"`, `"survived"` or what went wrong."""
    source = (ROOT / "modeling_vwlmm" / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        return f"the edit fits {source.count(mutant.old)} places of {mutant.file}, expected one"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("modeling_vwlmm", "processing", "tests", "examples", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "Makefile"):
            shutil.copy(ROOT / name, folder)
        # The package is installed from where it is developed: the copy has to come first, under the names it has
        # there.
        Path(folder, "processing_vwlmm").symlink_to("processing")
        Path(folder, "modeling_vwlmm", mutant.file).write_text(source.replace(mutant.old, mutant.new))
        files, _, names = mutant.tests.partition("::")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/{file}" for file in files.split()] + (["-k", names] if names else [])
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    # 1: tests failed; 0: all passed; else pytest could not run them.
    return {0: "survived", 1: "killed"}.get(result.returncode, f"no tests ran: {result.stdout[-500:]}")


def main(names: list[str]) -> None:
    """Runs the mutants that are named, or all."""
    mutants = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with ThreadPoolExecutor(NUM_WORKERS) as workers:
        results = []
        for mutant, result in zip(mutants, workers.map(run, mutants), strict=True):
            results.append(result)
            print(f"{result:10} {mutant.name}", flush=True)
    print(f"{results.count('killed')} of {len(results)} mutants are killed.")
    sys.exit(results.count("killed") < len(results))


if __name__ == "__main__":
    main(sys.argv[1:])
