"""TRL's DistillationTrainer, with a teacher that reads its own format and steps that a resumed run repeats.

Kept from TRL: generation, the divergences over the whole vocabulary, chunk by chunk through both output
layers so that logits of `(tokens, vocabulary)` never exist, the Trainer's loop and checkpoints. Source of the
method: Agarwal et al., GKD, arXiv:2306.13649.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from trl import DistillationTrainer

from distill_app.refining.prompts import Prompt, bare_first_tokens


class OnPolicyTrainer(DistillationTrainer):
    """Trains on answers that the student draws and, in the other steps, on those that are known.

    Its dataset has one column, `prompt`, the number of a record in `prompts`.

    Args:
        prompts: the records in tokens.
        on_policy: share of steps whose answers the student draws. Which these are follows from the seed.
    """

    def __init__(self, *args: Any, prompts: Sequence[Prompt], on_policy: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._prompts, self._on_policy = prompts, on_policy
        self._teachers_prompt = {tuple(prompt.student): prompt.teacher for prompt in prompts}
        student: Any = self.model
        self._bare = bare_first_tokens(self._tokenizer, student.config.get_text_config().vocab_size)
        self._asked: list[int] = []

    def draws(self, step: int) -> bool:
        """Tell whether the student writes the answers of a step, from 0."""
        return _share(self.args.seed, step) < self._on_policy

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Seed all that a step draws by (seed, step, process), so that a resumed run draws the same."""
        student: Any = self.model
        if student.training:
            torch.manual_seed(_seed(self.args.seed, self.state.global_step, self.args.process_index))
        return super()._prepare_inputs(generation_batch)

    def _tokenize_prompts(self, prompts: Sequence[int]) -> tuple[list[list[int]], None, dict[str, Any]]:
        self._asked = list(prompts)
        return [self._prompts[number].student for number in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **options: Any) -> list[list[int]]:
        is_drawn = self.draws(self.state.global_step)
        self._metrics["train"]["on_policy"].append(float(is_drawn))
        if not is_drawn:
            return [self._prompts[number].answer for number in self._asked]
        drawn: list[list[int]] = super()._generate_single_turn(prompt_ids, *args, **options)
        return drawn

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Leave an answer's first token out of the loss where the two formats begin an answer differently."""
        prompt_ids, answers, _, *rest = super()._generate(prompts)
        learned = [
            [int(self._prompts[number].student == self._prompts[number].teacher)] + [1] * (len(answer) - 1)
            for number, answer in zip(self._asked, answers, strict=True)
        ]
        return prompt_ids, answers, learned, *rest

    def _get_last_hidden_state(
        self,
        unwrapped_model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        **options: Any,
    ) -> Tensor:
        """Return the hidden states that predict the answers; the teacher's behind its own prompts."""
        if unwrapped_model is self.accelerator.unwrap_model(self.teacher_model):
            input_ids, attention_mask = self._as_asked(input_ids, attention_mask, logits_to_keep)
        states: Tensor = super()._get_last_hidden_state(
            unwrapped_model, input_ids, attention_mask, logits_to_keep, **options
        )
        return states

    def _as_asked(
        self, input_ids: Tensor, attention_mask: Tensor, answer_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Return `(rows, tokens)` ids and mask with the teacher's prompts, padded at the left."""
        asked, answers = [], input_ids[:, -answer_tokens:].tolist()
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            own = ids[mask.index(1) : len(ids) - answer_tokens]
            asked.append(self._teachers_prompt[tuple(own)])
            if asked[-1] != own:
                answers[row][0] = self._bare.get(answers[row][0], answers[row][0])
        width, pad = max(map(len, asked)), self._tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row + rest for row, rest in zip(asked, answers, strict=True)]
        there = [[0] * (width - len(row)) + [1] * len(row) for row in asked]
        device = input_ids.device
        mask = torch.cat([torch.tensor(there, device=device), attention_mask[:, -answer_tokens:]], 1)
        return torch.tensor(ids, device=device), mask


def _seed(*parts: int) -> int:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 2**63


def _share(*parts: int) -> float:
    """Return a number from 0 to 1 that the parts decide."""
    return _seed(*parts, 0x5EED) / 2**63
