"""The teacher's recipe and the demo's models."""

import json
import math
from itertools import islice

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_bd.demo.corpus import generate_split
from openrlhf_bd.demo.measure import accuracy_by_family, response_log_probs, top_p_sizes
from openrlhf_bd.demo.models import TEACHER_FOLDER, build_model, init_student, student_config, teacher_config
from openrlhf_bd.demo.recipe import (
    Recipe,
    collate,
    encode_records,
    iter_batches,
    learning_rate_at,
    make_optimizer,
    response_loss,
    train_steps,
)

MAX_TEACHER_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer that ships with the teacher."""
    return AutoTokenizer.from_pretrained(str(TEACHER_FOLDER))


def test_first_steps_are_those_of_the_shipped_teacher(tokenizer) -> None:
    """The recipe's first losses are the recorded ones, to a thousandth (CPUs round differently)."""
    recorded = json.loads((TEACHER_FOLDER / "recipe_losses.json").read_text("utf-8"))
    recipe = Recipe()
    assert recorded["recipe"] == vars(recipe)
    model = build_model(teacher_config(len(tokenizer), tokenizer.eos_token_id), recipe.seed)
    rows = islice(train_steps(model, make_optimizer(model, recipe), tokenizer, recipe), len(recorded["losses"]))
    assert [row["loss"] for row in rows] == pytest.approx(recorded["losses"], rel=1e-3)


def test_batches_do_not_depend_on_a_restart(tokenizer) -> None:
    """Step k has the same batch whether the run began at 0 or was resumed, also across a pool's end."""
    recipe = Recipe(batch_size=2)
    whole = list(islice(iter_batches(recipe, tokenizer), 40))
    resumed = list(islice(iter_batches(recipe, tokenizer, start_step=30), 10))
    for first, second in zip(whole[30:], resumed, strict=True):
        assert torch.equal(first.ids_BT, second.ids_BT)
        assert torch.equal(first.target_mask_BT, second.target_mask_BT)


def test_collate_marks_the_response_and_its_end() -> None:
    """Targets are the response tokens and end of text: those after the prompt, none in the padding."""
    # Row 0: prompt [5, 6], response [7], end 0. Row 1: prompt [5], response [8, 9], end 0 and one more token.
    batch = collate([([5, 6, 7, 0], 2), ([5, 8, 9, 4, 0], 1)], pad_id=0)
    assert batch.ids_BT.tolist() == [[5, 6, 7, 0, 0], [5, 8, 9, 4, 0]]
    assert batch.target_mask_BT.tolist() == [[False, True, True, False, False], [True, True, True, True, False]]


def test_learning_rate_schedule() -> None:
    """Linear to the peak, half-way down in the middle of the cosine, the floor at the end."""
    recipe = Recipe(num_steps=110, warmup_steps=10, learning_rate=1.0, final_fraction=0.0)
    assert learning_rate_at(0, recipe) == pytest.approx(0.1)
    assert learning_rate_at(9, recipe) == pytest.approx(1.0)
    assert learning_rate_at(60, recipe) == pytest.approx(0.5)
    assert learning_rate_at(110, recipe) == pytest.approx(0.0)


def test_loss_of_uniform_logits(tokenizer) -> None:
    """Zero logits: cross-entropy is log V per token, and the z-loss adds its weight times (log V)^2."""
    model = build_model(student_config(len(tokenizer), tokenizer.eos_token_id), seed=0)
    torch.nn.init.zeros_(model.model.norm.weight)
    batch = next(iter_batches(Recipe(batch_size=2), tokenizer))
    objective, cross_entropy = response_loss(model, batch, z_loss=0.01)
    log_v = math.log(600)
    assert cross_entropy.item() == pytest.approx(log_v, rel=1e-5)
    assert objective.item() == pytest.approx(log_v + 0.01 * log_v**2, rel=1e-5)


def test_padding_does_not_change_the_loss(tokenizer) -> None:
    """A row's log-probabilities are the same alone and beside a longer row."""
    model = build_model(student_config(len(tokenizer), tokenizer.eos_token_id), seed=0)
    records = generate_split("test", 6, 0)
    together, _, _ = response_log_probs(model, tokenizer, records)
    alone = torch.cat([response_log_probs(model, tokenizer, [record])[0] for record in records])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_encoded_record_ends_with_end_of_text(tokenizer) -> None:
    """A training row is prompt, response, end of text."""
    record = generate_split("test", 1, 0)[0]
    ((ids, num_prompt),) = encode_records([record], tokenizer)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[num_prompt:-1]) == record["output"]
    assert tokenizer.decode(ids[:num_prompt]).endswith("### Response:\n")


def test_non_finite_loss_stops_before_the_step(tokenizer) -> None:
    """A NaN raises and leaves the other weights as they were."""
    recipe = Recipe(batch_size=2)
    model = build_model(student_config(len(tokenizer), tokenizer.eos_token_id), seed=0)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(FloatingPointError, match="step 0: loss is nan"):
        next(train_steps(model, make_optimizer(model, recipe), tokenizer, recipe))
    assert torch.equal(before, model.model.embed_tokens.weight)


def test_student_folder_loads_and_is_reproducible(tokenizer, tmp_path) -> None:
    """Two students of one seed have equal weights, another seed's differ; all share the teacher's tokenizer."""
    folders = [init_student(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    weights = [
        AutoModelForCausalLM.from_pretrained(str(f), dtype=torch.float32).model.embed_tokens.weight for f in folders
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert AutoTokenizer.from_pretrained(str(folders[0])).get_vocab() == tokenizer.get_vocab()


def test_shipped_teacher_is_small_and_loads() -> None:
    """The teacher's weights are 16-bit, finite, and at most 8 MiB; heads are 32 wide and embeddings are tied."""
    path = TEACHER_FOLDER / "model.safetensors"
    assert path.stat().st_size <= MAX_TEACHER_BYTES
    with safe_open(str(path), framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (not a mapping)
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors)
    config = AutoModelForCausalLM.from_pretrained(str(TEACHER_FOLDER)).config
    assert config.tie_word_embeddings
    assert config.hidden_size // config.num_attention_heads == 32


def test_shipped_teacher_predicts_test_answers(tokenizer) -> None:
    """On unseen problems the teacher's loss is near the entropy of the answers' styles, not that of a guess."""
    model = AutoModelForCausalLM.from_pretrained(str(TEACHER_FOLDER), dtype=torch.float32)
    log_probs_NV, targets_N, level_N = response_log_probs(model, tokenizer, generate_split("test", 64, 1))
    assert -log_probs_NV.gather(1, targets_N[:, None]).mean() < 0.35
    assert level_N.abs().mean() < 1.0


def test_top_p_sizes() -> None:
    """The smallest set whose probability reaches p: of .6 .3 .1, one token for .5, two for .8, three for .95."""
    log_probs_NV = torch.tensor([[0.3, 0.6, 0.1]]).log()
    assert [top_p_sizes(log_probs_NV, p).item() for p in (0.5, 0.8, 0.95)] == [1, 2, 3]


def test_accuracy_by_family() -> None:
    """Fractions of right answers by family: a has one of two, b one of one, all two of three."""
    records = [{"family": f, "answer": "7"} for f in ("a", "a", "b")]
    responses = ["Answer: 7", "Answer: 8", "Result: 7"]
    assert accuracy_by_family(records, responses) == {"a": 0.5, "all": 2 / 3, "b": 1.0}
