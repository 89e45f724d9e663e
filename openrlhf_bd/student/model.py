"""The student: a Hugging Face causal language model whose loss is computed inside its forward pass.

Needs torch and transformers alone. Shapes: B rows, L positions of a row, S states, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from openrlhf_bd.functional.head import StudentHead
from openrlhf_bd.functional.sparse_head import SparseHead
from openrlhf_bd.student.attention import rows_of_pack

# Families whose logits are the output embedding of the decoder's last hidden state and nothing else.
FAMILIES = ("gpt2", "llama", "opt", "qwen2", "qwen3")

Result = TypeVar("Result")


class OutputHead(nn.Linear):
    """A model's output embedding that computes a loss from hidden states, so that no logits leave it.

    Whatever reads the embedding does so in this module's own forward and backward pass: there, and nowhere else,
    DeepSpeed's ZeRO-3 puts the parts of a weight together.

    Args:
        embedding: the output embedding that this module stands in for; its parameters are shared, tied or not.
    """

    def __init__(self, embedding: nn.Linear) -> None:
        nn.Module.__init__(self)  # Linear's own would make new parameters
        self.in_features, self.out_features = embedding.in_features, embedding.out_features
        self._parameters.update(embedding._parameters)  # weight, and bias or None

    def forward(self, hidden_SH: Tensor, loss: Callable[[StudentHead], Result] | None = None) -> Any:
        """What the loss makes of these states; without a loss their logits, as the family's own code expects.

        Args:
            hidden_SH: hidden states. Gradient flows.
            loss: gets the student's head, gives tensors, in tuples or dictionaries.
        """
        if loss is None:
            return linear(hidden_SH, self.weight, self.bias)
        if torch.is_grad_enabled():
            return loss(SparseHead(hidden_SH, self.weight, self.bias))
        # What is computed without gradient may be kept while the parameters get other values.
        return loss(SparseHead(hidden_SH, self.weight.detach(), None if self.bias is None else self.bias.detach()))


class StudentModel(nn.Module):
    """A causal language model whose forward pass gives a loss over chosen states.

    Args:
        model: the Hugging Face model; its output embedding is replaced by an OutputHead of the same parameters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        model.set_output_embeddings(OutputHead(model.get_output_embeddings()))

    def head(self, hidden_SH: Tensor) -> StudentHead:
        """The head at hidden states that a forward pass gave. No gradient flows; it outlives other weights."""
        with torch.no_grad():
            head: StudentHead = self.model.get_output_embeddings()(hidden_SH, loss=lambda head: head)
        return head

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None, state_index_S: Tensor
    ) -> Tensor:
        """Hidden states before the output head, [S, H], at positions of the flattened input. Gradient flows."""
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **rows_of_pack(position_ids, attention_mask),
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, state_index_S)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        state_index_S: Tensor,
        loss: Callable[[StudentHead], Result] | None,
    ) -> Result | Tensor:
        """What a loss makes of the student's logits at the chosen states; without one, the hidden states there.

        Args:
            input_ids: token ids, [B, L]; packed rows are [1, L].
            position_ids: position of each token in its own row, [B, L].
            attention_mask: 1 on tokens and 0 on padding, [B, L]; None for packed rows or without padding.
            state_index_S: positions in the flattened input that the loss is about, [S].
            loss: gets the student's head at these states, gives tensors, in tuples or dictionaries; or None.

        Returns:
            What the loss gives, or [S, H]. Gradient flows as the loss says.
        """
        hidden_SH = self.hidden_states(input_ids, position_ids, attention_mask, state_index_S)
        if loss is None:
            return hidden_SH
        # By name: ZeRO-3 looks at positional arguments for tensors and warns of others.
        result: Result = self.model.get_output_embeddings()(hidden_SH, loss=loss)
        return result


def context_length(model: StudentModel) -> int:
    """Longest row that the student can read, tokens."""
    return int(model.model.config.max_position_embeddings)


def vocabulary_size(model: StudentModel) -> int:
    """Number of logits of a state."""
    return int(model.model.config.vocab_size)


def state_dict_of(engine: Any, *, zero_stage: int) -> dict[str, Tensor]:
    """Weights under their Hugging Face names, on CPU; under ZeRO-3 whole on rank 0 and empty elsewhere. Collective.

    Tied weights share memory, so that they are written once.

    Args:
        engine: DeepSpeed engine around a StudentModel.
        zero_stage: its ZeRO stage.
    """
    weights = engine._consolidated_16bit_state_dict() if zero_stage == 3 else engine.module.state_dict()
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, tensor in (weights or {}).items():
        key = (tensor.data_ptr(), tensor.shape)
        named[name.removeprefix("model.")] = copies.setdefault(key, tensor.detach().cpu())
    return named
