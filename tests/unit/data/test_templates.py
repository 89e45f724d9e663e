from openrlhf_bd.data.templates import format_prompt


def test_instruction_and_input():
    """The wrapper is Fig. 3's, line by line."""
    assert format_prompt("Add the numbers.", "1 2") == (
        "Below is an instruction that describes a task.\n"
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Add the numbers.\n"
        "\n"
        "### Input:\n"
        "1 2\n"
        "\n"
        "### Response:\n"
    )


def test_without_input():
    """Without further input there is no Input block."""
    assert format_prompt("Say hello.") == (
        "Below is an instruction that describes a task.\n"
        "Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Say hello.\n"
        "\n"
        "### Response:\n"
    )


def test_braces_stay():
    """Braces in a record are text, not places to fill in."""
    assert "{0} {input}" in format_prompt("{0} {input}", "{}")
