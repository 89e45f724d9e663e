"""The instruction wrapper of the paper."""

PREAMBLE = (
    "Below is an instruction that describes a task.\nWrite a response that appropriately completes the request.\n\n"
)


def format_prompt(instruction: str, context: str = "") -> str:
    """The prompt for an instruction, in the wrapper of Fig. 3 (`--data.prompt_wrapper paper`).

    Args:
        instruction: what to do.
        context: further input of the instruction; without any, the wrapper has no Input block.

    Returns:
        The text up to and including the line break after `### Response:`, where the response begins.
    """
    context_block = f"### Input:\n{context}\n\n" if context else ""
    return f"{PREAMBLE}### Instruction:\n{instruction}\n\n{context_block}### Response:\n"
