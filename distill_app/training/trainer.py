"""transformers' Trainer over packed rows, with this project's loss, evaluation and optimizer."""

import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from distill_app.training.batches import (
    Batch,
    Collator,
    StepBatches,
    StepLoader,
    first_token,
    parts_of,
    rounded_up,
    uncounted,
)
from distill_app.training.examples import NO_LOSS, Example
from distill_app.training.losses import Objective, Teacher, summed_loss
from distill_app.training.optimizer import SplitAdamW
from distill_app.training.packing import attention_options, use_packed_attention

ROW_MULTIPLE = 64  # tokens


class DistillationTrainer(Trainer):
    """Trainer whose step is one packed batch, cut into parts that memory holds.

    A device's examples of a step come as one batch; how it is cut changes memory and speed and not what is
    learned, because each token weighs the same in the step. So there is no accumulation of micro-batches, and
    a step means the same on any number of devices.

    Args:
        objective: what is minimised in training; the loss on held-out examples is on hard labels alone.
        tokens_at_a_time: that go through the model in one part of a step, or the longest example's.
        split_weights: the model is in bfloat16 and SplitAdamW moves it.
        tokens_per_step: on all devices together, in place of a number of examples.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        tokens_at_a_time: int,
        split_weights: bool = False,
        tokens_per_step: int | None = None,
        **options: Any,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        arguments = options["args"]
        use_one_device(arguments)
        in_half = split_weights or arguments.bf16 or arguments.fp16
        self.packs = use_packed_attention(base, arguments.device, in_half)
        base.forward = MethodType(_loss_forward, base)
        if split_weights:
            options["optimizer_cls_and_kwargs"] = (SplitAdamW, _adam_options(arguments))
        super().__init__(model=model, **options)
        self.model_accepts_loss_kwargs = True  # so that the Trainer counts the labels of a step
        self.loss_is_scaled_for_ga = True
        self.objective: Objective = objective
        self.hard_labels = Objective(softcap=objective.softcap)
        self.tokens_at_a_time, self.tokens_per_step = tokens_at_a_time, tokens_per_step
        self.tokens_seen = 0

    def step_batches(self) -> StepBatches:
        """Return which examples each step takes, and this process's share of them."""
        examples: Any = self.train_dataset
        return StepBatches(
            [len(example.input_ids) for example in examples],
            self.args.per_device_train_batch_size * self.args.world_size,
            self.tokens_per_step,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            self.args.world_size,
            self.args.process_index,
        )

    def get_train_dataloader(self) -> Any:
        """Return this process's batches, one a step.

        accelerate would give each process equally many examples, and for that some of them twice.
        """
        examples: Any = self.train_dataset
        with_uncounted: Any = [*examples, uncounted(examples[0])]
        return StepLoader(
            with_uncounted,
            batch_sampler=self.step_batches(),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]
        """Leave out an epoch that a callback has ended before its first step."""
        if not self.control.should_training_stop:
            super()._run_epoch(**options)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Add the gradients of a device's examples of a step; return their loss.

        Where one device's memory runs out, the step begins again with half as many tokens at a time.

        Raises:
            ValueError: it ran out with one example, or with several processes.
        """
        model.train()
        self.tokens_seen += inputs["input_ids"].shape[1] * self.args.world_size
        while True:
            try:
                return self._add_gradients(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as err:
                self._halve(inputs, err)
                traceback.clear_frames(err.__traceback__)  # they hold the tensors of the part that failed
            model.zero_grad()
            torch.cuda.empty_cache()

    def _add_gradients(self, model: Any, batch: Batch, labels: Any) -> Tensor:
        parts = self._parts(batch)
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts, start=1):
            synced = nullcontext() if number == len(parts) else self.accelerator.no_sync(model)
            with synced, self.compute_loss_context_manager():
                loss = self.compute_loss(model, part, num_items_in_batch=labels)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed token losses over the labels of the whole step on all devices.

        The devices' gradients are averaged afterwards, hence the factor.
        """
        labels = num_items_in_batch if num_items_in_batch is not None else _labels(inputs)
        scale = self.accelerator.num_processes / labels
        outputs = model(**self._placed(inputs), distill_objective=self.objective, distill_scale=scale)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss a token on the held-out examples' hard labels, each weighing the same."""
        examples: list[Any] = eval_dataset or self.eval_dataset  # type: ignore[assignment]
        # As many on every device: those that are short of one take part with one that does not count
        padded = [*examples, *[uncounted(examples[0])] * (-len(examples) % self.args.world_size)]
        mine = padded[self.args.process_index :: self.args.world_size]
        self.model_wrapped.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for part in self._parts(Collator()(mine)):
                outputs = self.model_wrapped(**self._placed(part), distill_objective=self.hard_labels)
                sums += torch.tensor([outputs.loss.item(), _labels(part).item()], dtype=torch.float64)
        loss, labels = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": loss / max(labels, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def example_losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return of each example the summed loss on its hard labels and how many they are.

        One example goes through at a time, and every device takes all: sharded models need each other.
        """
        self.model_wrapped.eval()
        found = []
        for example in examples:
            (part,) = self._parts(Collator()([example]))
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model_wrapped(**self._placed(part), distill_objective=self.hard_labels).loss
            found.append((loss.item(), int(_labels(part))))
        return found

    def _placed(self, part: Batch) -> dict[str, Any]:
        """Return a part as the forward pass takes it, on this process's device.

        What Python reads is found here on the CPU, so that it need not wait for the device: the examples'
        lengths, and the places of labels that a hidden state before them predicts. An example's first token
        never has one.
        """
        targets = (part["labels"][0, 1:] != NO_LOSS).nonzero()[:, 0] + 1
        tensors = {**{k: v for k, v in part.items() if k != "lengths"}, "targets": targets}
        return {**self._prepare_inputs(tensors), "lengths": part["lengths"].tolist()}

    def _parts(self, batch: Batch) -> list[Batch]:
        """Return a batch's parts, as many on every device: sharded models gather their weights for each."""
        least = 1 if self.packs else len(batch["lengths"])
        parts = list(parts_of(batch, self.tokens_at_a_time, least))
        if self.args.world_size > 1:
            mine = torch.tensor([len(parts)], device=self.args.device)
            most = int(self.accelerator.gather(mine).max())
            parts = list(parts_of(batch, self.tokens_at_a_time, most))
            parts += [first_token(batch)] * (most - len(parts))
        if self.packs and self.args.device.type == "cpu":
            parts = [rounded_up(part, ROW_MULTIPLE) for part in parts]
        return parts

    def _halve(self, batch: Batch, err: Exception) -> None:
        """After memory ran out: halve the tokens at a time, down to the longest example's.

        Raises:
            ValueError: that would change nothing, or the other processes would not know.
        """
        longest = int(batch["lengths"].max())
        used = min(self.tokens_at_a_time, batch["input_ids"].shape[1])
        if self.args.world_size > 1 or used <= longest:
            raise ValueError(
                f"out of memory on {self.args.device} with {used} tokens at a time and a longest example of"
                f" {longest}; lower batching.tokens_at_a_time or training.max_length, or set"
                " training.gradient_checkpointing to true"
            ) from err
        self.tokens_at_a_time = max(used // 2, longest)
        print(
            f"training: out of memory with {used} tokens at a time; going on with {self.tokens_at_a_time}",
            file=sys.stderr,
            flush=True,
        )


def _loss_forward(
    self: Any,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    targets: Tensor,
    lengths: Sequence[int],
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

    Args:
        input_ids, position_ids, labels: `(1, tokens)`.
        targets: `(labels,)`, the places in the row that have a label.
        lengths: tokens of each example.
    """
    hidden = self.get_decoder()(
        input_ids=input_ids,
        position_ids=position_ids,
        use_cache=False,
        **attention_options(self, lengths),
    ).last_hidden_state
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


def use_one_device(arguments: Any) -> None:
    """Keep to one of a machine's GPUs, unless accelerate has started this process as one of several.

    The Trainer would wrap the model in DataParallel, which cannot cut a packed row.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def _adam_options(args: Any) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def check_output_layer(model: Any, example: Example, softcap: float | None) -> None:
    """Make sure that this trainer computes a model's logits as the model does; called before training.

    Raises:
        ValueError: the model does more than an output layer over its last hidden states.
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
            f"{type(model).__name__}: its logits are no plain output layer over its last hidden states,"
            " which this trainer needs; take another student, or train_sX.backend: easydistill"
        )


def set_deterministic(seed: int) -> None:
    """Make a run repeatable to the bit on one machine."""
    from transformers import set_seed

    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a check for others' defects, and slow
