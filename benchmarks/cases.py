# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""
What is measured. Each case is a function that builds its inputs for a size, and returns one step to time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


Step = Callable[[], object]

# positions, hidden size, vocabulary; then of the whole model: layers, hidden size, vocabulary, patches a side, text tokens
LOSS_SIZES = {"small": (288, 256, 8000), "full": (1152, 1024, 32000), "7b": (9216, 4096, 32000)}
MODEL_SIZES = {"small": (2, 256, 8000, 12, 24), "full": (8, 512, 32000, 24, 72)}


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

    def step():
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


def kl_floor(size: str) -> Step:
    """The four matrix products that no way of computing this can do without."""
    h, w, x, v = (tensor.detach() for tensor in loss_inputs(*LOSS_SIZES[size]))

    def step():
        logits, teacher_logits = h @ w.T, x @ v.T
        return logits @ w, logits.T @ h, teacher_logits

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

    def step():
        text = F.linear_cross_entropy(h[:half], w, labels, reduction="sum", options=options)
        backward(text + linear_kl_div(h[half:], w, x[half:], v), h, w)

    return step


# ----------------------------------------------------------------------------------------------------- the whole model


def make_model(size: str):
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


def prepare_stage(size: str, stage: int):
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
    from modeling_vwlmm.training.trainer import pack

    model, _ = prepare_stage(size, 4)
    batch = make_mixed_batch(size)
    batch = {name: tensor.to(device()) for name, tensor in (pack(batch) if packed else batch).items()}

    def step():
        model(**batch, visual_objective="visual_words", use_cache=False).loss.backward()
        model.zero_grad()

    return step


def stage_step(size: str, stage: int) -> Step:
    objective = {3: "vm_head", 4: "visual_words"}[stage]
    model, batch = prepare_stage(size, stage)

    def step():
        model(**batch, visual_objective=objective, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def stage_step_written_out(size: str, stage: int) -> Step:
    """
    Both heads and both losses over all positions, copied together as the authors' forward does it: at every position
    the VM head meets what the decoder reads there, and logits and visual words are shifted before image positions are
    picked. Where the authors' targets had gradients that nobody needs, these have none.
    """
    model, batch = prepare_stage(size, stage)
    is_image = batch["input_ids"] == model.config.image_token_id  # [B, L]

    def step():
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


# ------------------------------------------------------------------------------------------------------------ inference


def make_llava(model):
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


CASES: dict[str, Callable[[str], Step]] = {
    "kl": kl_ours,
    "kl written out": kl_written_out,
    "kl trl": kl_trl,
    "kl liger": kl_liger,
    "kl floor": kl_floor,
    "text and kl": both_ours,
    "text and kl apart": both_separately,
    "stage 4": lambda size: stage_step(size, 4),
    "stage 4 written out": lambda size: stage_step_written_out(size, 4),
    "stage 3": lambda size: stage_step(size, 3),
    "stage 3 written out": lambda size: stage_step_written_out(size, 3),
    "packed": lambda size: mixed_step(size, True),
    "padded": lambda size: mixed_step(size, False),
    "scale": scaled_kl(1, 1),
    "scale, positions": scaled_kl(8, 1),
    "scale, vocabulary": scaled_kl(1, 4),
    "prefill": lambda size: generation_step(size, 1, True),
    "prefill llava": lambda size: generation_step(size, 1, False),
    "decode": lambda size: generation_step(size, 32, True),
    "decode llava": lambda size: generation_step(size, 32, False),
    "preprocess": lambda size: preprocessing_step(size, True),
    "preprocess llava": lambda size: preprocessing_step(size, False),
}
