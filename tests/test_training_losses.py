"""The chunked loss against plain float64 references."""

import math

import pytest
import torch

from distill_app.training import losses
from distill_app.training.losses import Objective, Teacher, summed_loss

TOKENS, WIDTH, VOCAB, SHARED, TOP = 23, 8, 40, 36, 5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks in several groups, the last of each not full."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 3)
    monkeypatch.setattr(losses, "GROUP_TOKENS", 7)


@pytest.fixture
def case():
    """Hidden states, output layer, targets and a teacher for some of the tokens, in float32."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=make)
    layer = torch.nn.Linear(WIDTH, VOCAB)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(VOCAB, WIDTH, generator=make))
        layer.bias.copy_(torch.randn(VOCAB, generator=make))
    targets = torch.randint(0, SHARED, (TOKENS,), generator=make)
    teacher = top_of(torch.randn(TOKENS, SHARED, generator=make).mul(2).log_softmax(-1))
    known = torch.rand(TOKENS, generator=make) < 0.7
    assert known.any() and not known.all()
    return hidden, layer, targets, Teacher(teacher.ids, teacher.logprobs, teacher.tail, known)


def top_of(logs, top=TOP):
    """Return a teacher's K likeliest tokens of `(tokens, vocabulary)` log-probabilities."""
    logprobs, ids = logs.topk(top, -1)
    tail = logs.scatter(1, ids, float("-inf")).logsumexp(-1)
    return Teacher(ids, logprobs, tail, torch.ones(len(logs), dtype=torch.bool))


def reference(logits, targets, objective, teacher=None):
    """Return each token's loss, written down token by token in probabilities."""
    if objective.softcap:
        logits = objective.softcap * (logits / objective.softcap).tanh()
    found = []
    for n in range(len(logits)):
        p = logits[n].softmax(-1)
        eps = objective.label_smoothing
        hard = -(1 - eps) * p[targets[n]].log() - eps * p.log().mean()
        if objective.by_confidence:
            hard = hard * p[targets[n]].detach()
        if teacher is None or not objective.kd_ratio or not teacher.known[n]:
            found.append(hard)
            continue
        q = logits[n, : objective.vocab_size].softmax(-1)
        others = [i for i in range(len(q)) if i not in teacher.ids[n].tolist()]
        q = torch.cat([q[teacher.ids[n]], q[others].sum()[None]])
        t = torch.cat([teacher.logprobs[n], teacher.tail[n][None]]).to(logits.dtype).exp()
        q, t = (x ** (1 / objective.temperature) for x in (q, t))
        q, t = q / q.sum(), t / t.sum()
        of, to = (t, q) if objective.divergence == "forward_kld" else (q, t)
        kl = (of * (of / to).log()).sum() * objective.temperature**2
        found.append((1 - objective.kd_ratio) * hard + objective.kd_ratio * kl)
    return torch.stack(found)


HARD = {
    "plain": Objective(),
    "label smoothing": Objective(label_smoothing=0.1),
    "confidence": Objective(by_confidence=True),
    "softcap": Objective(softcap=3.0),
}
TAUGHT = {
    f"{divergence}, temperature {temperature}, ratio {ratio}": Objective(
        ratio, divergence, temperature, vocab_size=SHARED, softcap=softcap
    )
    for divergence in ("forward_kld", "reverse_kld")
    for temperature, ratio, softcap in ((1.0, 1.0, None), (2.5, 0.4, None), (0.7, 0.8, 3.0))
}


@pytest.mark.parametrize("name", [*HARD, *TAUGHT])
@pytest.mark.parametrize("has_bias", [True, False])
def test_value_and_gradients_are_those_of_a_plain_float64_reference(case, name, has_bias):
    hidden, layer, targets, teacher = case
    objective = {**HARD, **TAUGHT}[name]
    if not has_bias:
        layer = torch.nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(True)
        layer.weight = case[1].weight
    inputs = [hidden.requires_grad_(), *layer.parameters()]
    loss = summed_loss(hidden, layer, targets, objective, teacher, scale=0.37)
    found = torch.autograd.grad(loss * 1.5, inputs)  # whatever comes after multiplies
    plain = [tensor.detach().double().requires_grad_() for tensor in inputs]
    logits = torch.nn.functional.linear(*plain)
    expected = 0.37 * reference(logits, targets, objective, teacher).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(expected * 1.5, plain), strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_hard_labels_beside_a_teacher_of_no_weight_count_alone(case):
    hidden, layer, targets, teacher = case
    with_teacher = summed_loss(hidden, layer, targets, Objective(0.0, vocab_size=SHARED), teacher)
    assert with_teacher.item() == summed_loss(hidden, layer, targets, Objective()).item()


def test_tokens_without_a_distribution_learn_their_hard_label_in_full(case):
    hidden, layer, targets, teacher = case
    nothing = Teacher(
        torch.zeros_like(teacher.ids),
        torch.zeros_like(teacher.logprobs),
        torch.zeros_like(teacher.tail),
        torch.zeros_like(teacher.known),
    )
    hidden.requires_grad_()
    grads, sums = [], []
    for objective, given in ((Objective(), None), (Objective(1.0, vocab_size=SHARED), nothing)):
        loss = summed_loss(hidden, layer, targets, objective, given)
        grads.append(torch.autograd.grad(loss, hidden)[0])
        sums.append(loss.item())
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kld", "reverse_kld"])
@pytest.mark.parametrize(("kept", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-4)])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(case, divergence, kept, tolerance):
    hidden, layer, targets, _ = case
    hidden.requires_grad_()
    full = layer(hidden)[:, :SHARED].detach().log_softmax(-1)
    teacher = top_of(full)
    teacher = Teacher(
        teacher.ids, teacher.logprobs.to(kept).float(), teacher.tail.to(kept).float(), teacher.known
    )
    for temperature in (1.0, 2.0):
        objective = Objective(1.0, divergence, temperature, vocab_size=SHARED)
        loss = summed_loss(hidden, layer, targets, objective, teacher, scale=1 / TOKENS)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert abs(loss.item()) < tolerance
        assert gradient.abs().max() < (1e-5 if kept is torch.float32 else 1e-2)
    rolled = teacher[torch.arange(TOKENS).roll(1)]
    assert summed_loss(hidden, layer, targets, objective, rolled, scale=1 / TOKENS).item() > 0.5


def test_mass_beyond_the_likeliest_counts_as_one_token_of_its_own(case):
    hidden, layer, targets, _ = case
    full = layer(hidden).detach()[:, :SHARED].double().log_softmax(-1).roll(1, 0)
    teacher = top_of(full.float())
    objective = Objective(1.0, vocab_size=SHARED)
    loss = summed_loss(hidden, layer, targets, objective, teacher).item()
    student = layer(hidden).detach()[:, :SHARED].double().softmax(-1)
    kept = torch.zeros_like(student).scatter_(1, teacher.ids, 1.0).bool()
    expected = 0.0
    for p, q, mask in zip(full.exp(), student, kept, strict=True):
        expected += (p[mask] * (p[mask] / q[mask]).log()).sum().item()
        p_tail, q_tail = p[~mask].sum().item(), q[~mask].sum().item()
        expected += p_tail * math.log(p_tail / q_tail)
    assert loss == pytest.approx(expected, rel=1e-5)
    whole = (full.exp() * (full - student.log())).sum().item()
    assert 0 < loss < whole  # lumping can only lower a KL


def test_padding_rows_of_the_output_layer_take_no_part_in_the_divergence(case):
    hidden, layer, targets, teacher = case
    padded = torch.nn.Linear(WIDTH, VOCAB)
    with torch.no_grad():
        padded.weight.copy_(layer.weight)
        padded.bias.copy_(layer.bias)
        padded.bias[SHARED:] += 20  # they would take all the mass
    objective = Objective(1.0, vocab_size=SHARED)
    known = Teacher(teacher.ids, teacher.logprobs, teacher.tail, torch.ones_like(teacher.known))
    one = summed_loss(hidden, layer, targets, objective, known)
    two = summed_loss(hidden, padded, targets, objective, known)
    assert one.item() == pytest.approx(two.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(two, padded.weight)
    assert not gradient[SHARED:].any() and gradient[:SHARED].any()


def test_bfloat16_gradients_come_in_bfloat16_and_near_the_reference(case):
    hidden, layer, targets, teacher = case
    layer.to(torch.bfloat16)
    hidden = hidden.bfloat16().requires_grad_()
    objective = Objective(0.5, vocab_size=SHARED)
    loss = summed_loss(hidden, layer, targets, objective, teacher, scale=torch.tensor(1 / TOKENS))
    found = torch.autograd.grad(loss, [hidden, layer.weight, layer.bias])
    plain = [t.detach().double().requires_grad_() for t in (hidden, layer.weight, layer.bias)]
    expected = reference(torch.nn.functional.linear(*plain), targets, objective, teacher).mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for ours, theirs in zip(found, torch.autograd.grad(expected, plain), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_no_gradient_is_made_where_none_is_wanted(case, monkeypatch):
    hidden, layer, targets, teacher = case
    monkeypatch.setattr(losses, "_Gradients", None)
    layer.requires_grad_(False)
    for objective in (Objective(), Objective(0.5, vocab_size=SHARED)):
        with torch.no_grad():
            loss = summed_loss(hidden, layer, targets, objective, teacher)
        expected = reference(layer(hidden).double(), targets, objective, teacher).sum()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_frozen_output_layers_get_no_gradient_and_pass_one_on(case):
    hidden, layer, targets, _ = case
    layer.requires_grad_(False)
    hidden.requires_grad_()
    summed_loss(hidden, layer, targets, Objective()).backward()
    assert hidden.grad is not None and layer.weight.grad is None and layer.bias.grad is None


def test_no_label_gives_gradients_of_zero_for_all_that_is_trained(case):
    """DDP waits for a gradient of every weight, also in a process that has no example of its own."""
    hidden, layer, targets, _ = case
    hidden.requires_grad_()
    loss = summed_loss(hidden[:0], layer, targets[:0], Objective())
    loss.backward()
    assert loss.item() == 0
    for gradient in (hidden.grad, layer.weight.grad, layer.bias.grad):
        assert gradient is not None and not gradient.any()
