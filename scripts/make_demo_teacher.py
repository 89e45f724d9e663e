#!/usr/bin/env python
"""Train the demo's teacher from nothing, about 35 minutes on two CPU cores, and write the folder that ships.

    python scripts/make_demo_teacher.py train --work build/demo_teacher     # resumes where it stopped
    python scripts/make_demo_teacher.py export --work build/demo_teacher    # latest checkpoint -> package folder
    python scripts/make_demo_teacher.py card                                # measure the shipped teacher

`train` also exports by itself at every checkpoint. The log is `<work>/train.jsonl`, one JSON object per step.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from openrlhf_bd.demo.measure import measure_teacher
from openrlhf_bd.demo.models import TEACHER_FOLDER, build_model, generation_config, teacher_config
from openrlhf_bd.demo.recipe import Recipe, make_optimizer, train_steps
from openrlhf_bd.demo.tokenizer import save_tokenizer, train_tokenizer

NUM_RECORDED_LOSSES = 4


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "export", "card"))
    parser.add_argument("--folder", type=Path, default=TEACHER_FOLDER, help="the teacher's folder")
    parser.add_argument("--work", type=Path, default=Path("build/demo_teacher"), help="checkpoints and the log")
    parser.add_argument("--num_steps", type=int, default=Recipe.num_steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint_every_s", type=float, default=300.0)
    return parser.parse_args()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, trained first where there is none."""
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(), folder)
    return AutoTokenizer.from_pretrained(str(folder))


def replace_file(path: Path, write: Any) -> None:
    """Write a file under another name, then rename it, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def save_checkpoint(path: Path, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, num_done: int) -> None:
    """Everything that a restart needs; the examples follow from the number of steps done."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "num_done": num_done}
    replace_file(path, lambda partial: torch.save(state, partial))


def export_teacher(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the weights in 16 bits and the configuration.

    float16 rounds these small weights eight times finer than bfloat16. The configuration still says float32: that is
    the type to compute in on a CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        half = Qwen2ForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half = half.half()
        half.config.dtype = torch.float16
        half.generation_config = generation_config(tokenizer.eos_token_id)
        half.save_pretrained(partial)
        config = json.loads((Path(partial) / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = "float32"
        (Path(partial) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in sorted(Path(partial).iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def train(arguments: argparse.Namespace) -> None:
    """Train to the end, from the latest checkpoint where there is one."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(num_steps=arguments.num_steps)
    tokenizer = load_tokenizer(arguments.folder)
    model = build_model(teacher_config(len(tokenizer), tokenizer.eos_token_id), recipe.seed)
    optimizer = make_optimizer(model, recipe)
    checkpoint, num_done = arguments.work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        num_done = state["num_done"]
    losses: list[float] = []
    started = saved = time.monotonic()
    with (arguments.work / "train.jsonl").open("a", encoding="utf-8") as log:
        for row in train_steps(model, optimizer, tokenizer, recipe, num_done):
            now = time.monotonic()
            log.write(json.dumps({**row, "time_s": round(now - started, 1)}) + "\n")
            log.flush()
            losses.append(row["loss"])
            if num_done == 0 and len(losses) == NUM_RECORDED_LOSSES:
                write_losses(arguments.folder / "recipe_losses.json", recipe, losses)
            if now - saved > arguments.checkpoint_every_s:
                saved = now
                save_checkpoint(checkpoint, model, optimizer, int(row["step"]) + 1)
                export_teacher(model, tokenizer, arguments.folder)
    save_checkpoint(checkpoint, model, optimizer, recipe.num_steps)
    export_teacher(model, tokenizer, arguments.folder)


def write_losses(path: Path, recipe: Recipe, losses: list[float]) -> None:
    """Record the first losses, which a unit test reproduces."""
    content = {"recipe": dataclasses.asdict(recipe), "losses": losses}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(arguments: argparse.Namespace) -> None:
    """Export the latest checkpoint."""
    tokenizer = load_tokenizer(arguments.folder)
    model = build_model(teacher_config(len(tokenizer), tokenizer.eos_token_id), seed=0)
    state = torch.load(arguments.work / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    export_teacher(model, tokenizer, arguments.folder)


def card(arguments: argparse.Namespace) -> None:
    """Measure the shipped teacher and write `card.json` beside it."""
    measured = measure_teacher(arguments.folder, num_records=1600, seed=0)
    text = json.dumps(measured, indent=2) + "\n"
    (arguments.folder / "card.json").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Run one stage."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    {"train": train, "export": export, "card": card}[arguments.stage](arguments)


if __name__ == "__main__":
    main()
