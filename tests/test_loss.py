# Copyright 2026 The VW-LMM authors.
# SPDX-License-Identifier: Apache-2.0
"""The fused loss gives what the losses written out over full logits give."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modeling_vwlmm import kernels_vwlmm, linear_kl_div, loss_vwlmm
from modeling_vwlmm.loss_vwlmm import linear_loss


T, V, D, C = 37, 51, 24, 311  # text and image positions, hidden size, vocabulary: nothing divides anything
TEXT_SCALE, IMAGE_SCALE = 0.3, 0.7


@pytest.fixture(autouse=True, params=["one chunk", "many chunks", "kernels"])
def way(request, monkeypatch):
    """Every way to compute the loss; on a machine without a GPU, Triton's interpreter runs the kernels."""
    if request.param != "one chunk":
        monkeypatch.setitem(loss_vwlmm.CHUNK_BYTES, "cpu", 4 * C * 16)
        monkeypatch.setattr(loss_vwlmm, "CPU_BLOCK_BYTES", 4 * C * 5)
    if request.param == "kernels":
        assert kernels_vwlmm.triton is not None, "Install the `dev` extra: it has Triton."
        monkeypatch.setattr(kernels_vwlmm, "TILE", 128)
        monkeypatch.setattr(loss_vwlmm, "_use_kernels", lambda hidden: hidden.dtype != torch.float64)
    return request.param


def make_inputs(dtype=torch.float64, sharpness=1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student_hidden": (sharpness * random(T + V, D)).requires_grad_(),
        "student_weight": random(C, D).requires_grad_(),
        "labels": torch.randint(0, C, (T,), generator=generator),
        "teacher_hidden": (sharpness * random(V, D)).requires_grad_(),
        "teacher_weight": random(C, D).requires_grad_(),
    }


def written_out(student_hidden, student_weight, labels, teacher_hidden, teacher_weight, teacher_temperature=1.0):
    """Cross-entropy, divergence, and both entropies from full logits, as sums."""
    logits = (student_hidden @ student_weight.T).float() if student_hidden.dtype != torch.float64 else None
    logits = student_hidden @ student_weight.T if logits is None else logits
    log_q = F.log_softmax(logits, dim=-1)  # [T + V, C]
    teacher_logits = (teacher_hidden @ teacher_weight.T).to(log_q.dtype) / teacher_temperature
    log_p = F.log_softmax(teacher_logits, dim=-1).detach()  # [V, C]
    cross_entropy = F.nll_loss(log_q[:T], labels, reduction="sum")
    kl_div = F.kl_div(log_q[T:], log_p, log_target=True, reduction="sum")
    entropies = [-(log.exp() * log).sum() for log in (log_p, log_q[T:].detach())]
    return cross_entropy, kl_div, *entropies


def gradients(loss, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.autograd.grad(loss, [inputs["student_hidden"], inputs["student_weight"]])


class TestValues:
    @pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
    @pytest.mark.parametrize("sharpness", [0.01, 1.0, 30.0])
    def test_losses_and_gradients(self, dtype, rtol, sharpness):
        inputs = make_inputs(dtype, sharpness)
        expected = written_out(**{name: t.double() if t.is_floating_point() else t for name, t in inputs.items()})
        expected_loss = TEXT_SCALE * expected[0] + IMAGE_SCALE * expected[1]
        output = linear_loss(**inputs, text_scale=TEXT_SCALE, image_scale=IMAGE_SCALE)
        for found, wanted in zip(output, (expected_loss, *expected), strict=True):
            assert_close(found.double(), wanted.detach(), rtol=rtol, atol=1e-8, check_dtype=False)
        expected_gradients = gradients(expected_loss, inputs)
        for found, wanted in zip(gradients(output.loss, inputs), expected_gradients, strict=True):
            assert (found - wanted).norm() <= rtol * wanted.norm()

    @pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.float16, 1e-2)])
    @pytest.mark.parametrize("temperature", [0.25, 4, 1e-6, 1e30])
    def test_temperature_of_the_teacher(self, dtype, rtol, temperature):
        """In fp16 logits of 10 divided by 1e-6 are infinite."""
        inputs = make_inputs(dtype)
        expected = written_out(**inputs, teacher_temperature=temperature)
        output = linear_loss(**inputs, teacher_temperature=temperature)
        assert_close(output[1:], expected, atol=1e-3, rtol=rtol)
        wanted = gradients(expected[0] + expected[1], inputs)
        assert_close(gradients(output.loss, inputs), wanted, atol=20 * rtol, rtol=rtol)

    def test_kl_div_alone_is_its_sum_over_rows(self):
        inputs = make_inputs()
        hidden = inputs["student_hidden"][T:]
        found = linear_kl_div(hidden, inputs["student_weight"], inputs["teacher_hidden"], inputs["teacher_weight"])
        assert_close(found, written_out(**inputs)[1])

    def test_kl_div_of_a_student_that_agrees_is_zero(self):
        inputs = make_inputs(torch.float32)
        hidden, weight = inputs["teacher_hidden"].detach(), inputs["teacher_weight"].detach()
        assert abs(linear_kl_div(hidden, weight, hidden, weight)) < 1e-5

    def test_kl_div_of_a_student_that_nearly_agrees(self):
        inputs = make_inputs(torch.float32)
        hidden, weight = inputs["teacher_hidden"].detach(), inputs["teacher_weight"].detach()
        student = hidden + 1e-3 * torch.randn(V, D, generator=torch.Generator().manual_seed(1))
        found = linear_kl_div(student, weight, hidden, weight)
        exact = linear_kl_div(student.double(), weight.double(), hidden.double(), weight.double())
        assert 0 < exact < 1e-2  # what is left of entropies of more than 100
        assert_close(found.double(), exact, rtol=2e-2, atol=0)

    def test_gradcheck(self):
        inputs = make_inputs()
        hidden, weight = inputs["student_hidden"][T : T + 5].detach(), inputs["student_weight"][:13].detach()
        teacher = inputs["teacher_hidden"][:5].detach(), inputs["teacher_weight"][:13].detach()
        student = (hidden.requires_grad_(), weight.requires_grad_())
        assert torch.autograd.gradcheck(lambda h, w: linear_kl_div(h, w, *teacher), student)

    def test_positions_of_one_kind_only(self):
        inputs = make_inputs()
        cross_entropy, kl_div, *_ = written_out(**inputs)
        hidden, no_labels = inputs["student_hidden"], torch.empty(0, dtype=torch.long)
        text = {**inputs, "student_hidden": hidden[:T], "teacher_hidden": inputs["teacher_hidden"][:0]}
        image = {**inputs, "student_hidden": hidden[T:], "labels": no_labels}
        assert_close(linear_loss(**text).loss, cross_entropy)
        assert_close(linear_loss(**image).loss, kl_div)

    def test_no_positions_at_all_is_a_zero_that_can_be_trained_on(self):
        weight = torch.randn(C, D, requires_grad=True)
        loss = linear_kl_div(torch.empty(0, D), weight, torch.empty(0, D), torch.randn(C, D))
        loss.backward()
        assert loss == 0 and not weight.grad.any()


class TestPrecision:
    def test_bf16_is_no_worse_than_written_out(self, way):
        # Triton's interpreter cuts fp32 off at bf16, where a GPU rounds.
        tolerance = 1.3 if way == "kernels" and not torch.cuda.is_available() else 1.05
        inputs = make_inputs(torch.bfloat16)
        exact = written_out(**{name: t.double() if t.is_floating_point() else t for name, t in inputs.items()})
        plain = written_out(**inputs)
        output = linear_loss(**inputs)
        assert output.loss.dtype == torch.float32
        for index in (0, 1):
            assert abs(output[1 + index] - exact[index]) <= abs(plain[index] - exact[index]) + 1e-3 * exact[index]
        wanted = gradients(exact[0] + exact[1], inputs)
        by_plain = gradients(plain[0] + plain[1], inputs)
        for found, plain_gradient, exact_gradient in zip(
            gradients(output.loss, inputs), by_plain, wanted, strict=True
        ):
            assert found.dtype == torch.bfloat16
            error = (found.double() - exact_gradient.double()).norm()
            assert error <= tolerance * (plain_gradient.double() - exact_gradient.double()).norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_keeps_statistics_and_gradients_in_fp32(self, dtype):
        inputs = make_inputs(torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            output = linear_loss(**inputs)
        assert output.loss.dtype == torch.float32
        exact = written_out(**inputs)
        assert_close(output.loss, exact[0] + exact[1], rtol=1e-2, atol=0)
        for gradient in gradients(output.loss, inputs):
            assert gradient.dtype == torch.float32

    def test_loss_scaling_saves_small_gradients_in_fp16(self):
        scale, loss_scale = 1 / 18432, 2.0**16  # 32 images of 576 tokens, and the scale that fp16 training starts from
        inputs = make_inputs(torch.float32, sharpness=0.1)
        expected = gradients(scale * sum(written_out(**inputs)[:2]), inputs)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = linear_loss(**inputs, text_scale=scale, image_scale=scale).loss
        for found, wanted in zip(gradients(loss_scale * loss, inputs), expected, strict=True):
            assert (found / loss_scale - wanted).norm() <= 5e-3 * wanted.norm()

    def test_scaled_loss_scales_gradients(self):
        inputs = make_inputs()
        plain = gradients(linear_loss(**inputs).loss, inputs)
        scaled = gradients(1024 * linear_loss(**inputs).loss, inputs)
        for once, many in zip(plain, scaled, strict=True):
            assert_close(1024 * once, many)


class TestGradients:
    def test_the_teacher_gets_none(self):
        inputs = make_inputs()
        linear_loss(**inputs).loss.backward()
        assert inputs["teacher_hidden"].grad is None and inputs["teacher_weight"].grad is None

    @pytest.mark.parametrize("trained", ["student_hidden", "student_weight"])
    def test_only_what_is_asked_for_is_computed(self, trained, monkeypatch):
        inputs = {name: tensor.detach() for name, tensor in make_inputs().items()}
        inputs[trained].requires_grad_()
        products = {"student_hidden": 0, "student_weight": 0}
        mm, add_product = torch.mm, loss_vwlmm._add_product
        monkeypatch.setattr(torch, "mm", lambda *a, **k: (count(products, "student_hidden"), mm(*a, **k))[1])
        monkeypatch.setattr(
            loss_vwlmm, "_add_product", lambda *a: (count(products, "student_weight"), add_product(*a))[1]
        )
        linear_loss(**inputs).loss.backward()
        assert {name for name, times in products.items() if times} == {trained}
        with torch.no_grad():
            products.update(student_hidden=0, student_weight=0)
            assert not linear_loss(**inputs).loss.requires_grad
        assert not any(products.values())

    def test_losses_beside_the_sum_have_no_gradient(self):
        output = linear_loss(**make_inputs())
        assert output.loss.requires_grad
        assert not any(value.requires_grad for value in output[1:])


def count(counter: dict[str, int], name: str) -> None:
    counter[name] += 1


@pytest.mark.parametrize(
    "change",
    [
        {"labels": torch.zeros(T + 1, dtype=torch.long)},
        {"teacher_weight": torch.randn(C + 1, D, dtype=torch.float64)},
    ],
)
def test_shapes_that_do_not_fit_are_an_error(change):
    with pytest.raises(ValueError, match="student positions"):
        linear_loss(**{**make_inputs(), **change})


@pytest.mark.parametrize("most", [3, 15, 16, 40, 393])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 6), (7, 47), (0, 1152), (3, 1000)])
def test_chunks_hold_every_position_once_in_multiples_of_16(start, stop, most):
    chunks = loss_vwlmm._chunks(start, stop, most)
    assert [position for rows in chunks for position in range(rows.start, rows.stop)] == list(range(start, stop))
    sizes = [rows.stop - rows.start for rows in chunks]
    assert all(0 < size <= most for size in sizes)
    assert all(size == sizes[0] for size in sizes[:-1])
    assert most < 16 or all(size % 16 == 0 for size in sizes[:-1])
