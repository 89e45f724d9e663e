"""A judge that the job hosts: vLLM's own server in a Ray actor, and what is left of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import httpx
import psutil
import pytest

from openrlhf_bd.cli.judge import main
from openrlhf_bd.cli.new_model import main as new_model
from openrlhf_bd.config import JudgeOptions
from openrlhf_bd.demo.models import TEACHER_FOLDER
from openrlhf_bd.driver.cluster import ray_session
from openrlhf_bd.driver.judge_server import SERVER_LOG, check_served, hosted_judge, with_served_name
from openrlhf_bd.errors import ClusterError, ConfigError, DataError
from openrlhf_bd.evaluation.judge import judge_pairs
from tests.judge_server import write_responses_file

pytestmark = pytest.mark.integration

END_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge with random weights, room for a question, and no chat template."""
    folder = tmp_path_factory.mktemp("judge") / "tiny"
    shape = ["--hidden_size", "64", "--num_layers", "1", "--num_heads", "2", "--num_kv_heads", "1"]
    arguments = ["--tokenizer", str(TEACHER_FOLDER), "--output_dir", str(folder), *shape, "--max_len", "1024"]
    assert new_model(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with ray_session(num_gpus=1):
        yield


def options_for(model: Path, **values: float) -> JudgeOptions:
    given = {"serve": str(model), "constrained": True, "timeout_s": 120.0, **values}
    return with_served_name(JudgeOptions.model_validate(given))


def server_processes(model: Path) -> list[psutil.Process]:
    """The server of a model with all its children."""
    servers = [process for process in psutil.process_iter(["cmdline"]) if str(model) in (process.info["cmdline"] or [])]
    return [*servers, *(child for server in servers for child in server.children(recursive=True))]


def test_server_lives_for_the_length_of_the_judging(
    tmp_path: Path, model: Path, session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """It judges everything, for who has the key; Ctrl-C leaves no process behind; what is judged needs no server."""
    files = {
        label: write_responses_file(tmp_path / f"{label}.responses.jsonl", answers)
        for label, answers in {"BD": ["yes", "2 + 2 is 4", "no"], "KD": ["no", "4", "yes"]}.items()
    }
    out, options = tmp_path / "out", options_for(model)
    with pytest.raises(KeyboardInterrupt), hosted_judge(options, out) as api:  # noqa: PT012
        processes = set(server_processes(model))
        # The keeper, the server and its engine at least.
        assert len(processes) >= 3
        rates = judge_pairs(files, [("BD", "KD")], options, out, host=lambda: nullcontext(api))
        assert (rates.pairs[0].num_judged, rates.num_missing) == (3, 0)
        assert rates.model.startswith("tiny@")
        assert api.base_url.startswith("http://127.0.0.1:")
        refused = httpx.get(f"{api.base_url}/models", headers={"Authorization": "Bearer other"}, trust_env=False)
        assert refused.status_code == 401
        assert not any(api.key in " ".join(process.cmdline()) for process in processes)
        raise KeyboardInterrupt
    assert psutil.wait_procs(processes, END_TIMEOUT_S)[1] == []
    log = (out / SERVER_LOG).read_text(encoding="utf-8")
    assert "Application startup complete" in log
    written = [path.read_text(encoding="utf-8") for path in out.iterdir()]
    assert api.key not in "".join(written) + "".join(capfd.readouterr())
    flags = ["--serve", str(model), "--constrained", "--output_dir", str(out)]
    assert main([*map(str, files.values()), *flags]) == 0
    assert (out / SERVER_LOG).read_text(encoding="utf-8") == log
    assert rates.model in capfd.readouterr().out


def test_server_that_is_slow(tmp_path: Path, model: Path, session: None) -> None:
    """Who waits says for what and how long, and leaves nothing running."""
    message = r"the judge's server did not answer at http://127\S*/health within 1 s \(--serve_timeout_s\)"
    with pytest.raises(ClusterError, match=message), hosted_judge(options_for(model, serve_timeout_s=1.0), tmp_path):
        pass
    assert psutil.wait_procs(server_processes(model), END_TIMEOUT_S)[1] == []


def test_server_that_cannot_start(tmp_path: Path, model: Path, session: None) -> None:
    """A server that ends while it starts is not waited for, and its own words are in the message."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    (broken / "config.json").write_text(
        json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}), encoding="utf-8"
    )
    with pytest.raises(ClusterError) as error, hosted_judge(options_for(broken), tmp_path):
        pass
    assert "ended before it answered" in str(error.value)
    assert "NoSuchForCausalLM" in str(error.value)


def test_judge_is_checked_before_it_starts(tmp_path: Path, model: Path) -> None:
    """No model, and heads that GPUs cannot share, are refused; another chat template is another judge by name."""
    with pytest.raises(DataError, match=r"no such folder.*--serve"):
        check_served(str(tmp_path / "nothing"), JudgeOptions())
    with pytest.raises(ConfigError, match=r"--serve_gpus 3: .* has 2 attention heads"):
        check_served(str(model), JudgeOptions(serve_gpus=3))
    other = tmp_path / "tiny"
    shutil.copytree(model, other)
    assert options_for(other).model == options_for(model).model
    (other / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert options_for(other).model != options_for(model).model
    assert options_for(other).model.startswith("tiny@")
