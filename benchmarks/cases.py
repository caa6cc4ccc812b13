# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is measured. Each case is a function that builds its inputs for a size, and returns one step to time.
"""

import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

    from modeling_vwlmm import VWLMMForConditionalGeneration


Step = Callable[[], object]

# positions, hidden size, vocabulary
LOSS_SIZES = {"small": (288, 256, 8000), "full": (1152, 1024, 32000), "7b": (9216, 4096, 32000)}
WIDE_HIDDEN_SIZE = {"small": 1024, "full": 4096, "7b": 4096}
# layers, hidden size, vocabulary, patches a side, text tokens
MODEL_SIZES = {"small": (2, 256, 8000, 12, 24), "full": (8, 512, 32000, 24, 72)}
# hidden size, layers, heads, patches a side: "full" is CLIP's ViT-L/14 at 336 pixels
TOWER_SIZES = {"small": (128, 4, 4, 12), "full": (1024, 24, 16, 24)}
# widths of the VAE's levels, its channels of a latent: "full" is Stable Diffusion 3's
VAE_SIZES = {"small": ((8, 8, 8), 4), "full": ((128, 256, 512, 512), 16)}
# (y0, x0, y1, x1) of a snapshot and of the four patches of a square image, in the snapshot's unit square
BOXES = ((0, 0, 0, 0), (0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------------ the loss alone


def loss_inputs(num_positions: int, hidden_size: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """Student and teacher hidden states `[V, D]` and heads `[C, D]`; the student's require gradients."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    options = {"device": device(), "dtype": dtype}
    student_hidden = torch.randn(num_positions, hidden_size, **options).requires_grad_()
    teacher_hidden = torch.randn(num_positions, hidden_size, **options)
    student_weight = (torch.randn(vocab_size, hidden_size, **options) / hidden_size**0.5).requires_grad_()
    teacher_weight = torch.randn(vocab_size, hidden_size, **options) / hidden_size**0.5
    return student_hidden, student_weight, teacher_hidden, teacher_weight


def backward(loss: torch.Tensor, *inputs: torch.Tensor) -> None:
    loss.backward()
    for tensor in inputs:
        tensor.grad = None


def kl_ours(size: str) -> Step:
    from modeling_vwlmm import linear_kl_div

    inputs = loss_inputs(*LOSS_SIZES[size])
    return lambda: backward(linear_kl_div(*inputs), *inputs[:2])


def kl_written_out(size: str) -> Step:
    h, w, x, v = loss_inputs(*LOSS_SIZES[size])

    def step() -> None:
        log_q = F.log_softmax((h @ w.T).float(), dim=-1)
        log_p = F.log_softmax((x @ v.T).float(), dim=-1)
        backward(F.kl_div(log_q, log_p, log_target=True, reduction="sum"), h, w)

    return step


def kl_trl(size: str) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    h, w, x, v = loss_inputs(*LOSS_SIZES[size])
    return lambda: backward(ChunkedDivergenceFunction.apply(h, w, None, x, v, None, 0.0)[0].sum(), h, w)


def kl_liger(size: str) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    h, w, x, v = loss_inputs(*LOSS_SIZES[size])
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    labels = torch.zeros(len(h), dtype=torch.long, device=h.device)
    return lambda: backward(loss(h, w, x, v, labels), h, w)


def four_products(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
) -> Step:
    """
    The matrix products that no way of computing this loss can do without: logits of student and teacher, and the
    gradients of hidden states and head, each at once into memory that is there.
    """
    h, w, x, v = (tensor.detach() for tensor in (student_hidden, student_weight, teacher_hidden, teacher_weight))
    logits, teacher_logits = h.new_empty(len(h), len(w)), x.new_empty(len(x), len(v))
    grad_hidden, grad_weight = torch.empty_like(h), torch.empty_like(w)

    def step() -> None:
        torch.mm(h, w.T, out=logits)
        torch.mm(x, v.T, out=teacher_logits)
        torch.mm(logits, w, out=grad_hidden)
        torch.mm(logits.T, h, out=grad_weight)

    return step


def kl_floor(size: str) -> Step:
    return four_products(*loss_inputs(*LOSS_SIZES[size]))


def wide(case: Callable[[str], Step]) -> Callable[[str], Step]:
    """A case of the loss at the hidden size of a 7B decoder."""

    def wide_case(size: str) -> Step:
        LOSS_SIZES["wide"] = (LOSS_SIZES[size][0], WIDE_HIDDEN_SIZE[size], LOSS_SIZES[size][2])
        return case("wide")

    return wide_case


def head_gradient(size: str, by_tiles: bool) -> Step:
    """The head's gradient from bf16 operands, summed in fp32 over three chunks of positions."""
    from modeling_vwlmm.loss_vwlmm import _add_product

    num_positions, hidden_size, vocab_size = LOSS_SIZES[size]
    torch.manual_seed(0)
    options = {"device": device(), "dtype": torch.bfloat16}
    grad_logits = torch.randn(num_positions // 3, vocab_size, **options)
    hidden = torch.randn(num_positions // 3, hidden_size, **options)

    def step() -> torch.Tensor:
        if not by_tiles:
            total = (grad_logits.T @ hidden).float()  # [C, D]
            for _ in range(2):
                total += grad_logits.T @ hidden
            return total
        total = None
        for _ in range(3):
            total = _add_product(total, grad_logits.T, hidden)
        return total

    return step


def both_ours(size: str) -> Step:
    from modeling_vwlmm.loss_vwlmm import linear_loss

    h, w, x, v = loss_inputs(*LOSS_SIZES[size])
    half = len(h) // 2
    labels = torch.arange(half, device=h.device)
    return lambda: backward(linear_loss(h, w, labels, x[half:], v).loss, h, w)


def both_separately(size: str) -> Step:
    from modeling_vwlmm import linear_kl_div

    h, w, x, v = loss_inputs(*LOSS_SIZES[size])
    half = len(h) // 2
    labels = torch.arange(half, device=h.device)
    options = torch.nn.LinearCrossEntropyOptions()

    def step() -> None:
        text = F.linear_cross_entropy(h[:half], w, labels, reduction="sum", options=options)
        backward(text + linear_kl_div(h[half:], w, x[half:], v), h, w)

    return step


# ----------------------------------------------------------------------------------------------------- the whole model


def make_model(size: str) -> "VWLMMForConditionalGeneration":
    """A VW-LMM of the size's decoder, with a vision tower too small to matter."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration

    torch.manual_seed(0)
    layers, hidden_size, vocab_size, side, _ = MODEL_SIZES[size]
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=14 * side,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    config = VWLMMConfig(vision_config=vision, text_config=text, image_seq_length=side**2)
    return VWLMMForConditionalGeneration(config).to(device())


def make_batch(size: str, num_images: int = 2) -> dict[str, torch.Tensor]:
    """Two samples of one image and text, half of which is supervised."""
    _, _, vocab_size, side, num_text = MODEL_SIZES[size]
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, vocab_size, (num_images, num_text), generator=generator)
    image = torch.full((num_images, side**2), vocab_size)
    input_ids = torch.cat([text[:, :2], image, text[:, 2:]], dim=1)  # [B, L]
    labels = input_ids.clone()
    labels[:, : side**2 + num_text // 2] = -100
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(num_images, 3, 14 * side, 14 * side, generator=generator),
    }
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def prepare_stage(size: str, stage: int) -> tuple["VWLMMForConditionalGeneration", dict[str, torch.Tensor]]:
    from modeling_vwlmm.training.trainer import set_trainable_parameters

    model, batch = make_model(size), make_batch(size)
    set_trainable_parameters(model, stage)
    return model.train(), batch


def make_mixed_batch(size: str) -> dict[str, torch.Tensor]:
    """A sample of an image and text and one of text alone, padded on the right; all text is supervised."""
    _, _, vocab_size, side, num_text = MODEL_SIZES[size]
    generator = torch.Generator().manual_seed(0)
    text, longer = (torch.randint(3, vocab_size, (n,), generator=generator) for n in (num_text, 3 * num_text))
    rows = [torch.cat([text[:2], torch.full((side**2,), vocab_size), text[2:]]), longer]
    input_ids = pad_sequence(rows, batch_first=True)  # [B, L]
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # [B, L]
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill((attention_mask == 0) | (input_ids == vocab_size), -100),
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(1, 3, 14 * side, 14 * side, generator=generator),
    }


def mixed_step(size: str, packed: bool) -> Step:
    from modeling_vwlmm.training.collating import pack

    model, _ = prepare_stage(size, 4)
    batch = make_mixed_batch(size)
    batch = {name: tensor.to(device()) for name, tensor in (pack(batch) if packed else batch).items()}

    def step() -> None:
        model(**batch, visual_objective="visual_words", use_cache=False).loss.backward()
        model.zero_grad()

    return step


def stage_step(size: str, stage: int) -> Step:
    objective = {3: "vm_head", 4: "visual_words"}[stage]
    model, batch = prepare_stage(size, stage)

    def step() -> None:
        model(**batch, visual_objective=objective, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def stage_4_floor(size: str) -> Step:
    """The decoder, forward and backward from a gradient that is given, and the products of the head."""
    model, batch = prepare_stage(size, 4)
    is_image = batch["input_ids"] == model.config.image_token_id  # [B, L]
    with torch.no_grad():
        image_features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)  # [I * N, D]
    hidden = torch.randn(*batch["input_ids"].shape, model.config.text_config.hidden_size, device=device())
    num_image, num_text = len(image_features), int((batch["labels"] != -100).sum())
    teacher_hidden = hidden.flatten(0, 1)[:num_image]
    student_hidden = hidden.flatten(0, 1)[: num_image + num_text]
    products = four_products(student_hidden, model.lm_head.weight, teacher_hidden, model.model.vm_head.weight)

    def step() -> None:
        inputs_embeds = model.get_input_embeddings()(batch["input_ids"].masked_fill(is_image, 0))
        inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], image_features)  # [B, L, D]
        decoder = model.model.language_model
        decoder(inputs_embeds=inputs_embeds, attention_mask=batch["attention_mask"], use_cache=False)[0].backward(
            hidden
        )
        products()
        model.zero_grad()

    return step


def stage_3_floor_bytes(size: str) -> int:
    """The VM head's gradient, and one chunk of student and teacher logits."""
    from modeling_vwlmm.loss_vwlmm import _chunks, max_chunk_rows

    _, hidden_size, vocab_size, side, _ = MODEL_SIZES[size]
    most = max_chunk_rows(device(), vocab_size * 4) // 2
    chunk = _chunks(0, 2 * side**2, most)[0]
    return vocab_size * hidden_size * 4 + 2 * (chunk.stop - chunk.start) * vocab_size * 4


def stage_step_written_out(size: str, stage: int) -> Step:
    """
    Both heads and both losses over all positions, copied together as the authors' forward does it: at every position
    the VM head meets what the decoder reads there, and logits and visual words are shifted before image positions are
    picked. Where the authors' targets had gradients that nobody needs, these have none.
    """
    model, batch = prepare_stage(size, stage)
    is_image = batch["input_ids"] == model.config.image_token_id  # [B, L]

    def step() -> None:
        with torch.no_grad():
            image_features = torch.cat(model.get_image_features(batch["pixel_values"]).pooler_output)  # [I * N, D]
        inputs_embeds = model.get_input_embeddings()(batch["input_ids"].masked_fill(is_image, 0))
        inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], image_features)  # [B, L, D]
        visual_words = model.model.vm_head(inputs_embeds.detach())  # [B, L, C]
        decoder = model.model.language_model
        output = decoder(inputs_embeds=inputs_embeds, attention_mask=batch["attention_mask"], use_cache=False)
        logits = model.lm_head(output.last_hidden_state)  # [B, L, C]
        labels = batch["labels"][:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].contiguous().flatten(0, 1), labels, ignore_index=-100)
        logits = logits[:, :-1].contiguous()[is_image[:, 1:]]  # [I * N, C]
        visual_words = visual_words[:, 1:].contiguous()[is_image[:, 1:]]  # [I * N, C]
        if stage == 3:
            loss = loss + F.kl_div(visual_words.log_softmax(-1), logits.detach().softmax(-1), reduction="batchmean")
        else:
            loss = loss + F.kl_div(logits.log_softmax(-1), visual_words.detach().softmax(-1), reduction="batchmean")
        loss.backward()
        model.zero_grad()

    return step


def scale_size(size: str) -> tuple[int, int, int]:
    """Positions, hidden size and vocabulary that cost is scaled from. At full size, chunks fill their budget."""
    num_positions, hidden_size, vocab_size = LOSS_SIZES[size]
    return 8 * num_positions // 3, hidden_size // 2, vocab_size // 4


def scaled_kl(positions: int, vocabulary: int) -> Callable[[str], Step]:
    """The fused KL over so many times the positions and the vocabulary."""

    def case(size: str) -> Step:
        from modeling_vwlmm import linear_kl_div

        num_positions, hidden_size, vocab_size = scale_size(size)
        inputs = loss_inputs(num_positions * positions, hidden_size, vocab_size * vocabulary)
        return lambda: backward(linear_kl_div(*inputs), *inputs[:2])

    return case


# ------------------------------------------------------------------------------------------- against TRL's own trainer


def make_llava(model: "VWLMMForConditionalGeneration") -> "LlavaForConditionalGeneration":
    """LLaVA of Transformers around the very modules of a VW-LMM."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = model.config
    llava = LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.text_config.vocab_size - 1,
        image_seq_length=config.image_seq_length,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(llava)
    llava.model.vision_tower = model.model.vision_tower
    llava.model.multi_modal_projector = model.model.multi_modal_projector
    llava.model.language_model = model.model.language_model
    llava.lm_head = model.lm_head
    return llava


def trainer_step(size: str, ours: bool, compact: bool = False, **settings: Any) -> Step:
    """
    A step of stage II with `VWLMMTrainer`, or of TRL's `SFTTrainer` with LLaVA around the same weights: losses,
    gradients, AdamW. `compact` lets TRL's head score supervised positions alone on a CPU, too, as it does on CUDA.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import LlavaProcessor
    from trl import SFTConfig, SFTTrainer

    from modeling_vwlmm.objectives_vwlmm import find_supervised_positions
    from modeling_vwlmm.training import VWLMMTrainer, VWLMMTrainingArguments
    from modeling_vwlmm.training.collating import VWLMMDataCollator
    from processing_vwlmm import VWLMMProcessor

    model, batch = prepare_stage(size, 2)
    processor = VWLMMProcessor.from_vision_text_pretrained(
        "examples/small_world/vision_tower", "examples/small_world/llm"
    )
    processor.image_token_id = model.config.image_token_id  # of a vocabulary that only the random text is drawn from
    folder = tempfile.mkdtemp()
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": len(batch["input_ids"]),
        "gradient_accumulation_steps": 1,
        "report_to": "none",
        "max_length": None,
        "use_cpu": device().type == "cpu",
        **settings,
    }
    message = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": ""}]
    dataset = Dataset.from_dict({"messages": [message], "images": [["never read"]]})
    if ours:
        trainer = VWLMMTrainer(
            model, VWLMMTrainingArguments(stage=2, **settings), train_dataset=dataset, processing_class=processor
        )
        assert isinstance(trainer.data_collator, VWLMMDataCollator)
        batch["supervised_positions"] = find_supervised_positions(
            trainer.data_collator.objectives, batch, model.config.image_token_id
        )
    else:
        trl.trainer.utils._use_triton = lambda device: compact or device.type == "cuda"
        model, placeholder = make_llava(model).train(), model.config.image_token_id
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == placeholder, placeholder - 1)
        processor = LlavaProcessor(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            chat_template=processor.chat_template,
        )
        trainer = SFTTrainer(model, SFTConfig(**settings), train_dataset=dataset, processing_class=processor)
    if trainer.args.gradient_checkpointing:
        trainer.model.activation_checkpointing_enable()
    wrapped, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())

    def step() -> None:
        batches, counts = trainer.get_batch_samples(iter([dict(batch)]), 1, device())
        trainer.training_step(wrapped, batches[0], counts)
        optimizer.step()
        optimizer.zero_grad()

    return step


# ----------------------------------------------------------------------------------------------------- high resolution


def tower_config(size: str, num_layers: int | None = None) -> "CLIPVisionConfig":
    from transformers import CLIPVisionConfig

    hidden_size, layers, heads, side = TOWER_SIZES[size]
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers or layers,
        num_attention_heads=heads,
        image_size=14 * side,
        patch_size=14,
    )


def tower_step(size: str, with_perceiver: bool) -> Step:
    """The vision tower on a snapshot and its four patches; with the SA-Perceiver, which makes one image of them."""
    from transformers import CLIPVisionModel

    from modeling_vwlmm import VWLMMConfig
    from modeling_vwlmm.adapters_vwlmm import SAPerceiver
    from modeling_vwlmm.patches_vwlmm import split_patches
    from modeling_vwlmm.vision_vwlmm import run_vision_tower

    torch.manual_seed(0)
    config = VWLMMConfig(vision_config=tower_config(size))
    hidden_size, _, _, side = TOWER_SIZES[size]
    tower = CLIPVisionModel(config.vision_config).to(device()).eval()
    perceiver = SAPerceiver(hidden_size, side=side).to(device())
    pixel_values = torch.randn(len(BOXES), 3, 14 * side, 14 * side, device=device())
    boxes = torch.tensor(BOXES, device=device())

    @torch.inference_mode()
    def step() -> None:
        features, _ = run_vision_tower(tower, config, pixel_values)  # [5, N, W]
        if with_perceiver:
            snapshots, patches = split_patches(features, boxes)
            perceiver(snapshots, patches.features, patches.boxes, patches.num_patches)

    return step


def alignment_step(size: str, perceives: bool, checkpoints: bool) -> Step:
    """
    A step of stage I, its update included, on two images of five crops each: VLSA's, with reconstruction by the
    denoiser `per_token`, or LLaVA-NeXT's layout, in which the decoder reads every crop's tokens. The loss is the same
    code in both. The tower, which is frozen and keeps nothing, has two layers.
    """
    from transformers import LlamaConfig

    from modeling_vwlmm import VWLMMConfig, VWLMMForConditionalGeneration
    from modeling_vwlmm.objectives_vwlmm import find_supervised_positions, parse_objectives
    from modeling_vwlmm.training import attach_training_modules
    from modeling_vwlmm.training.trainer import set_trainable_parameters

    torch.manual_seed(0)
    layers, hidden_size, vocab_size, _, num_text = MODEL_SIZES[size]
    side = TOWER_SIZES[size][3]
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=4096,
    )
    adapter = "sa_perceiver" if perceives else "mlp"
    vision = tower_config(size, num_layers=2)
    config = VWLMMConfig(vision_config=vision, text_config=text, image_seq_length=side**2, adapter=adapter)
    model = VWLMMForConditionalGeneration(config).to(device())
    num_images, num_crops = 2, len(BOXES)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(3, vocab_size, (num_images, num_text), generator=generator)
    image = torch.full((num_images, side**2 * (1 if perceives else num_crops)), vocab_size)
    input_ids = torch.cat([words[:, :2], image, words[:, 2:]], dim=1)  # [B, L]
    batch = {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(input_ids == vocab_size, -100),
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(num_images * num_crops, 3, 14 * side, 14 * side, generator=generator),
    }
    if perceives:
        batch["patch_boxes"] = torch.tensor(BOXES * num_images)
    batch = {name: tensor.to(device()) for name, tensor in batch.items()}
    with tempfile.TemporaryDirectory() as folder:
        objective = {"reconstruction": {"vae": make_vae(size, folder), "weight": 1.0}} if perceives else {}
        objectives, _ = parse_objectives(objective)
        attach_training_modules(model, objectives)
    if perceives:
        batch |= {"image_seeds": list(range(num_images)), "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    batch["supervised_positions"] = find_supervised_positions(objectives, batch, vocab_size)  # as a collator does
    set_trainable_parameters(model, 1)
    model.train()
    if checkpoints:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        model(**batch, visual_objective=objective, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_vae(size: str, folder: str) -> str:
    """Saves a random VAE, and returns where."""
    from diffusers import AutoencoderKL

    widths, channels = VAE_SIZES[size]
    AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=2,
        latent_channels=channels,
        norm_num_groups=min(widths[0], 32),
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------- inference


def generation_step(size: str, num_new_tokens: int, ours: bool) -> Step:
    model = make_model(size).eval()
    inputs = {name: tensor for name, tensor in make_batch(size).items() if name != "labels"}
    if not ours:
        model = make_llava(model)
        input_ids, placeholder = inputs["input_ids"], model.config.image_token_id
        inputs["input_ids"] = input_ids.masked_fill(input_ids > placeholder, placeholder)
    settings = {"do_sample": False, "min_new_tokens": num_new_tokens, "max_new_tokens": num_new_tokens}
    return lambda: model.generate(**inputs, **settings, pad_token_id=0)


def preprocessing_step(size: str, ours: bool) -> Step:
    import numpy as np
    from PIL import Image
    from transformers import LlavaProcessor

    from processing_vwlmm import VWLMMProcessor

    rng = np.random.default_rng(0)
    sizes = [(640, 480), (480, 640), (336, 336), (1024, 768), (200, 300)] * {"small": 1, "full": 4}[size]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    processor = VWLMMProcessor.from_vision_text_pretrained(
        "examples/small_world/vision_tower", "examples/small_world/llm"
    )
    if not ours:
        processor = LlavaProcessor(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            patch_size=processor.patch_size,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            num_additional_image_tokens=processor.num_additional_image_tokens,
        )
    text = ["USER: <image>\nWhat colour is the circle? ASSISTANT:"] * len(images)
    settings = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}
    return lambda: processor(images=images, text=text, padding=True, return_tensors="pt", images_kwargs=settings)


# What TRL's trainer takes beside its defaults: `bf16` and checkpointed activations.
FP32 = {"bf16": False, "gradient_checkpointing": False}
BF16 = {"bf16": True, "gradient_checkpointing": False}

CASES: dict[str, Callable[[str], Step]] = {
    "kl": kl_ours,
    "kl written out": kl_written_out,
    "kl trl": kl_trl,
    "kl liger": kl_liger,
    "kl floor": kl_floor,
    "wide kl": wide(kl_ours),
    "wide kl floor": wide(kl_floor),
    "bf16 head by tiles": lambda size: head_gradient(size, True),
    "bf16 head at once": lambda size: head_gradient(size, False),
    "text and kl": both_ours,
    "text and kl apart": both_separately,
    "stage 4": lambda size: stage_step(size, 4),
    "stage 4 written out": lambda size: stage_step_written_out(size, 4),
    "stage 4 floor": stage_4_floor,
    "stage 3": lambda size: stage_step(size, 3),
    "stage 3 written out": lambda size: stage_step_written_out(size, 3),
    "trainer": lambda size: trainer_step(size, True, bf16=True),
    "trainer trl": lambda size: trainer_step(size, False),
    "trainer bf16": lambda size: trainer_step(size, True, **BF16),
    "trainer bf16 trl": lambda size: trainer_step(size, False, compact=True, **BF16),
    "trainer fp32": lambda size: trainer_step(size, True, **FP32),
    "trainer fp32 trl": lambda size: trainer_step(size, False, compact=True, **FP32),
    "packed": lambda size: mixed_step(size, True),
    "padded": lambda size: mixed_step(size, False),
    "scale": scaled_kl(1, 1),
    "scale, positions": scaled_kl(8, 1),
    "scale, vocabulary": scaled_kl(1, 4),
    "tower and perceiver": lambda size: tower_step(size, True),
    "tower": lambda size: tower_step(size, False),
    "vlsa": lambda size: alignment_step(size, True, False),
    "any-res": lambda size: alignment_step(size, False, False),
    "vlsa checkpointed": lambda size: alignment_step(size, True, True),
    "any-res checkpointed": lambda size: alignment_step(size, False, True),
    "prefill": lambda size: generation_step(size, 1, True),
    "prefill llava": lambda size: generation_step(size, 1, False),
    "decode": lambda size: generation_step(size, 32, True),
    "decode llava": lambda size: generation_step(size, 32, False),
    "preprocess": lambda size: preprocessing_step(size, True),
    "preprocess llava": lambda size: preprocessing_step(size, False),
}
FLOOR_BYTES: dict[str, Callable[[str], int]] = {"stage 3 floor": stage_3_floor_bytes}
