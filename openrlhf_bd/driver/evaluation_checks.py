"""What can be known to be wrong with an evaluation before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from openrlhf_bd.config import Config
from openrlhf_bd.driver.engine_limits import check_head_sizes, known_device
from openrlhf_bd.driver.model_files import STUDENT_OPTION, ModelFacts, inspect_model
from openrlhf_bd.driver.models import load_tokenizer
from openrlhf_bd.driver.remote_teacher import is_remote
from openrlhf_bd.driver.teachers import tokenizer_differences
from openrlhf_bd.errors import ConfigError, DataError
from openrlhf_bd.evaluation.evaluate import is_plain_sampling
from openrlhf_bd.evaluation.exposure_models import check_exposed
from openrlhf_bd.store.fingerprints import fingerprint_tokenizer


def uses_teacher(config: Config) -> bool:
    """Whether a teacher looks at the responses of an evaluation."""
    return config.eval.teacher_nll or config.eval.exposure


def check_sampling(config: Config) -> None:
    """Check the samplers, and what exposure needs of them and of the teacher.

    Raises:
        ConfigError: a nucleus is out of range or given twice, there is no seed, or exposure cannot be measured.
    """
    top_ps, seeds = config.eval.test_top_p, config.eval.seeds
    shown = " ".join(f"{top_p:g}" for top_p in top_ps) or "empty"
    if not top_ps or len(set(top_ps)) != len(top_ps) or not all(0 < top_p <= 1 for top_p in top_ps):
        raise ConfigError(
            f"--eval.test_top_p is {shown}; expected different numbers greater than 0 and of at most 1, such as 1.0 0.8"
        )
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"--eval.seeds is {seeds}; expected different whole numbers, at least one")
    if not config.eval.exposure:
        return
    if is_remote(config):
        raise ConfigError(
            "--eval.exposure with --teacher.api_base: a server does not tell the whole distribution of a state; give "
            "--teacher.model_name_or_path, or leave --eval.exposure away (--eval.teacher_nll works with a server)"
        )
    if config.teacher.model_name_or_path is None:
        raise ConfigError("--eval.exposure: --teacher.model_name_or_path is not given; it names the teacher")
    if not any(is_plain_sampling(config, top_p) for top_p in top_ps):
        raise ConfigError(
            f"--eval.exposure is about a model's own distribution: --eval.temperature is {config.eval.temperature:g}, "
            f"--eval.test_top_p is {shown}; use --eval.temperature 1, and 1.0 among --eval.test_top_p"
        )


def check_models(config: Config, models: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the models that the same engines are going to host.

    Args:
        config: the job.
        models: folder or hub name by label.
        tokenizer: that makes the prompts of all of them: of the first.

    Raises:
        ConfigError: a model is too short, its heads run in no engine, or exposure cannot be measured of it.
        DataError: a model cannot be read, or has another tokenizer than the first.
    """
    first = next(iter(models.values()))
    for label, name in models.items():
        facts = inspect_model(name, option=f"model {label!r}", trust_remote_code=config.trust_remote_code)
        _check_fits(config, label, facts, tokenizer)
        check_head_sizes(config, {STUDENT_OPTION: facts}, device=known_device(), stages=["evaluate"])
        own = tokenizer if name == first else load_tokenizer(name, config)
        if fingerprint_tokenizer(own) != fingerprint_tokenizer(tokenizer):
            differences = "; ".join(tokenizer_differences(own, tokenizer))
            raise DataError(
                f"the tokenizers of {name} (model {label!r}) and {first} differ: {differences}. Models that "
                "are evaluated together read the same prompts; evaluate this one by itself"
            )


def _check_fits(config: Config, label: str, facts: ModelFacts, tokenizer: PreTrainedTokenizerBase) -> None:
    if facts.max_positions is not None and config.data.max_len > facts.max_positions:
        raise ConfigError(
            f"--data.max_len {config.data.max_len} is more than the {facts.max_positions} positions of {facts.name} "
            f"(model {label!r}); lower it"
        )
    if facts.vocab_size < len(tokenizer):
        raise DataError(
            f"{facts.name} (model {label!r}): has {facts.vocab_size} embeddings for the {len(tokenizer)} tokens of the "
            "tokenizer; expected at least as many. Take the tokenizer that belongs to the model"
        )
    if config.eval.exposure:
        check_exposed(facts.name, facts.family)
