"""transformers' Trainer over packed rows, with this project's loss, evaluation and optimizer."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from distill_app.training.batches import Batch, Collator, parts_of, rounded_up
from distill_app.training.examples import NO_LOSS, Example
from distill_app.training.losses import Objective, Teacher, summed_loss
from distill_app.training.optimizer import SplitAdamW
from distill_app.training.packing import attention_options, use_packed_attention

ROW_MULTIPLE = 64  # tokens


class DistillationTrainer(Trainer):
    """Trainer whose step is one packed batch, cut into parts that memory holds.

    A device's examples of a step come as one batch; how it is cut changes memory and speed and not what is
    learned, because each token weighs the same in the step. So there is no accumulation of micro-batches.

    Args:
        objective: what is minimised in training; the loss on held-out examples is on words alone.
        token_budget: tokens that go through the model at a time.
        split_weights: the model is in bfloat16 and SplitAdamW moves it.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        token_budget: int,
        split_weights: bool = False,
        **options: Any,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.packs = use_packed_attention(base)
        base.forward = MethodType(_loss_forward, base)
        if split_weights:
            options["optimizer_cls_and_kwargs"] = (SplitAdamW, _adam_options(options["args"]))
        super().__init__(model=model, **options)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the labels of a step
        self.loss_is_scaled_for_ga = True
        self.objective: Objective = objective
        self.token_budget = token_budget
        self.words = Objective(softcap=objective.softcap)
        self.tokens_seen = 0

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]
        """Leave out an epoch that a callback has ended before its first step."""
        if not self.control.should_training_stop:
            super()._run_epoch(**options)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Add the gradients of a device's examples of a step, part by part; return their loss."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        parts = self._parts(inputs)
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            synced = nullcontext() if number == len(parts) else self.accelerator.no_sync(model)
            with synced, self.compute_loss_context_manager():
                loss = self.compute_loss(model, part, num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.tokens_seen += inputs["input_ids"].shape[1] * self.args.world_size
        return total

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed token losses over the labels of the whole step on all devices.

        The devices' gradients are averaged afterwards, hence the factor.
        """
        labels = num_items_in_batch if num_items_in_batch is not None else _labels(inputs)
        scale = self.accelerator.num_processes / labels
        outputs = model(**inputs, distill_objective=self.objective, distill_scale=scale)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss a token on the held-out examples' words, each weighing the same."""
        examples: list[Any] = eval_dataset or self.eval_dataset  # type: ignore[assignment]
        # As many on every device: those that are short of one take part with one that does not count
        uncounted = Example(examples[0].input_ids, [NO_LOSS] * len(examples[0].labels), examples[0].row)
        padded = [*examples, *[uncounted] * (-len(examples) % self.args.world_size)]
        mine = padded[self.args.process_index :: self.args.world_size]
        self.model_wrapped.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        batch = self._prepare_inputs(Collator()(mine))
        with torch.no_grad(), self.compute_loss_context_manager():
            for part in self._parts(batch):
                outputs = self.model_wrapped(**part, distill_objective=self.words)
                sums += torch.tensor([outputs.loss.item(), _labels(part).item()], dtype=torch.float64)
        loss, labels = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / max(labels, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def example_losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return of each example the summed loss on its words and how many they are.

        One example goes through at a time, and every device takes all: sharded models need each other.
        """
        self.model_wrapped.eval()
        found = []
        for example in examples:
            (part,) = self._parts(self._prepare_inputs(Collator()([example])))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model_wrapped(**part, distill_objective=self.words).loss
            found.append((loss.item(), int(_labels(part))))
        return found

    def _parts(self, batch: Batch) -> list[Batch]:
        """Return a batch's parts, as many on every device: sharded models gather their weights for each."""
        least = 1 if self.packs else len(batch["lengths"])
        parts = list(parts_of(batch, self.token_budget, least))
        if self.args.world_size > 1:
            mine = torch.tensor([len(parts)], device=self.args.device)
            most = int(self.accelerator.gather(mine).max())
            parts = list(parts_of(batch, self.token_budget, most))
        if self.packs and self.args.device.type == "cpu":
            parts = [rounded_up(part, ROW_MULTIPLE) for part in parts]
        return parts


def _loss_forward(
    self: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    lengths: Tensor,
    distill_objective: Objective,
    distill_scale: Tensor | float = 1.0,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    teacher_tail: Tensor | None = None,
    teacher_known: Tensor | None = None,
    **_: Any,
) -> CausalLMOutput:
    """Stand in for a causal model's forward pass: a packed row in, its summed loss out.

    It replaces the model's own, rather than being called beside it, because what wraps a model for several
    devices (DDP, FSDP) does its work around that.
    """
    hidden = self.get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        **attention_options(self, lengths.tolist()),
    ).last_hidden_state
    # Of a row's tokens, those that a state before them predicts; an example's first never has a label
    targets = (labels[0, 1:] != NO_LOSS).nonzero()[:, 0] + 1
    teacher = None
    if teacher_ids is not None and distill_objective.kd_ratio:
        fields = (teacher_ids, teacher_logprobs, teacher_tail, teacher_known)
        teacher = Teacher(*(field[0, targets] for field in fields if field is not None))
    loss = summed_loss(
        hidden[0, targets - 1],
        self.get_output_embeddings(),
        labels[0, targets],
        distill_objective,
        teacher,
        distill_scale,
    )
    return CausalLMOutput(loss=loss)


def _labels(batch: Batch) -> Tensor:
    return (batch["labels"][:, 1:] != NO_LOSS).sum()


def _adam_options(args: Any) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def check_output_layer(model: Any, example: Example, softcap: float | None) -> None:
    """Make sure that this trainer computes a model's scores as the model does; called before training.

    Raises:
        ValueError: the model does more than an output layer over its last states.
    """
    ids = torch.tensor([example.input_ids[:16]], device=model.device)
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ours = model.get_output_embeddings()(hidden).float()
    if softcap:
        ours = torch.tanh(ours / softcap) * softcap
    if not torch.allclose(ours, theirs, atol=0.05 * float(theirs.abs().max())):
        raise ValueError(
            f"{type(model).__name__}: its scores are no plain output layer over its last states, which this"
            " trainer needs; take another student, or train_sX.backend: easydistill"
        )


def set_deterministic(seed: int) -> None:
    """Make a run repeatable to the bit on one machine."""
    from transformers import set_seed

    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a check for others' defects, and slow
