"""Drift: the flags of the installed OpenRLHF against ours. When it changes, a person decides what that means for us."""

import argparse
import ast
import importlib.util
import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest

from openrlhf_bd.cli.options import Option, all_options

# Shared flags whose default is another one here, with the reason.
OTHER_DEFAULTS = {
    "ckpt.path": "a folder in the run's own, so that two runs never share checkpoints",
    "ds.attn_implementation": "auto is flash_attention_2 where it is installed, and sdpa on machines without it",
    "ds.lora.target_modules": "the same word, in a list like any other value of the option",
    "eval.temperature": "the paper evaluates at temperature 1",
    "logger.wandb.project": "another program, another project",
    "logger.wandb.run_name": "the name of the output folder, which is known when a run is resumed",
}
# Shared flags whose values are others here, with the reason.
OTHER_VALUES = {
    "ds.param_dtype": "fp32 as well, which is faster than bf16 on CPUs",
    "ds.grad_accum_dtype": "upstream takes any text; DeepSpeed knows these three",
}
# Upstream flags that we don't have, by name or beginning of a name, with the reason.
NOT_OFFERED = {
    "actor.aux_loss_coef": "mixture-of-experts students are not supported",
    "actor.dual_clip": "of PPO's loss",
    "actor.entropy_coef": "of PPO's loss",
    "actor.eps_clip": "of PPO's loss",
    "actor.freeze_visual_encoder": "text only",
    "actor.loss_agg_mode": "algo.distill.reduction",
    "actor.muon.nesterov": "DeepSpeed's Muon has Nesterov momentum always, and reads no such option",
    "actor.muon.no_nesterov": "DeepSpeed's Muon has Nesterov momentum always, and reads no such option",
    "actor.muon.ns_steps": "DeepSpeed's Muon makes five Newton-Schulz steps always, and reads no such option",
    "actor.policy_loss_type": "of PPO's loss",
    "algo.advantage.": "of reinforcement learning",
    "algo.dynamic_filtering": "of reinforcement learning",
    "algo.kl.": "of reinforcement learning",
    "critic.": "there is no critic",
    "data.dataloader_num_workers": "ranks read the store, not a data loader",
    "data.image_key": "text only",
    "data.max_images_per_prompt": "text only",
    "ds.deepcompile": "not supported",
    "ds.enable_sleep": "stages run one after another and free their GPUs",
    "ds.experts_implementation": "mixture-of-experts students are not supported",
    "ds.load_in_4bit": "needs bitsandbytes on CUDA; the exported student is a merged model, which 4 bits would round",
    "ds.ring_attn": "not supported",
    "ds.tensor_parallel_size": "not supported",
    "ds.value_head_prefix": "there is no critic",
    "eval.n_samples_per_prompt": "eval.seeds: one response a seed",
    "local_rank": "ranks are Ray actors",
    "ref.": "there is no reference model",
    "reward.": "there is no reward model",
    "rollout.batch_size": "train.batch_size: online each step has rows of its own",
    "rollout.max_tokens_per_gpu": "engines batch by themselves",
    "rollout.micro_batch_size": "engines batch by themselves",
    "rollout.vllm_generate_batch_size": "engines batch by themselves",
    "train.agent_func_path": "of reinforcement learning",
    "train.async": "algo.distill.max_staleness and algo.distill.max_ahead",
    "train.colocate_actor_ref": "there is no reference model",
    "train.colocate_critic_reward": "there is no critic and no reward model",
    "train.num_episodes": "train.max_epochs",
    "train.partial_rollout_enable": "algo.distill.in_flight",
    "use_ms": "hub data sets and models come from Hugging Face",
    "vllm.enable_sleep": "engines that share the ranks' GPUs always sleep while these train",
    "vllm.sync_": "how weights travel follows from the devices",
}


def upstream_flags() -> dict[str, argparse.Action]:
    """Flags of `openrlhf.cli.train_ppo_ray`: the statements of its main block that add one, run on a parser of ours."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "cli" / "train_ppo_ray.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    main = next(node for node in tree.body if isinstance(node, ast.If))
    parser = argparse.ArgumentParser(add_help=False)
    for statement in main.body:
        if isinstance(statement, ast.Expr | ast.For) and "parser.add_argument" in ast.unparse(statement):
            code = compile(ast.Module([statement], []), str(source), "exec")
            exec(code, {"parser": parser, "datetime": datetime})
    return {action.option_strings[0].removeprefix("--"): action for action in parser._actions}


UPSTREAM = upstream_flags()
SHARED = sorted(UPSTREAM.keys() & all_options().keys())


def our_type(option: Option) -> Any:
    """The type of one value of an option: the text's where it takes words."""
    if option.choices:
        return str
    (member,) = [member for member in option.types if member is not type(None)]
    return get_args(member)[0] if get_origin(member) in (list, tuple, Annotated) else member


def test_upstream_parser_was_read():
    """The reader finds the whole parser, its loop over actor and critic included."""
    assert len(UPSTREAM) > 150
    assert {"actor.adam.lr", "critic.adam.lr", "ds.zero_stage"} <= UPSTREAM.keys()
    assert UPSTREAM["actor.adam.lr"].default == 1e-6
    assert len(SHARED) > 60


@pytest.mark.parametrize("name", SHARED)
def test_shared_flag(name):
    """A flag that OpenRLHF also has takes values of the same type and has the same default, or a reason not to."""
    action, option = UPSTREAM[name], all_options()[name]
    if isinstance(action, argparse._StoreTrueAction):
        assert option.is_flag
    else:
        assert our_type(option) is action.type
    assert option.is_list == (action.nargs is not None and not option.is_flag)
    if name not in OTHER_VALUES:
        assert tuple(action.choices or ()) == option.choices
    same = option.default == action.default or (option.is_list and list(option.default) == list(action.default))
    assert same != (name in OTHER_DEFAULTS)


def test_every_upstream_flag_is_decided_on():
    """Each flag of OpenRLHF is offered here, or is listed with the reason why it is not."""
    ours = all_options()
    undecided = [name for name in UPSTREAM if name not in ours and not name.startswith(tuple(NOT_OFFERED))]
    assert undecided == []


def test_reasons_are_still_needed():
    """No exception is listed that OpenRLHF or we have since done away with."""
    assert [name for name in NOT_OFFERED if not any(flag.startswith(name) for flag in UPSTREAM)] == []
    assert [name for name in NOT_OFFERED if any(flag.startswith(name) for flag in all_options())] == []
    assert [name for name in (*OTHER_DEFAULTS, *OTHER_VALUES) if name not in SHARED] == []
    assert [name for name in OTHER_VALUES if tuple(UPSTREAM[name].choices or ()) == all_options()[name].choices] == []


def test_infinite_default():
    """The one default that is no finite number is the same: --ckpt.max_mem keeps any amount."""
    assert all_options()["ckpt.max_mem"].default == UPSTREAM["ckpt.max_mem"].default == math.inf
