import subprocess
import sys

import pytest


@pytest.mark.parametrize("room", ["openrlhf_bd.functional.bellman", "openrlhf_bd.algorithms"])
def test_inner_rooms_import_no_process_libraries(room: str) -> None:
    """Importing the mathematics and every built-in algorithm loads neither ray, vllm nor deepspeed."""
    code = (
        f"import sys, {room}\n"
        "from openrlhf_bd.functional import cross_entropy\n"
        "from openrlhf_bd.algorithms import available_algorithms\n"
        "available_algorithms()\n"
        "print(sorted({'ray', 'vllm', 'deepspeed', 'openrlhf', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
