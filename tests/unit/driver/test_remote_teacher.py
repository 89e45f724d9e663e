"""Options of a teacher behind a server, before anyone asks the server."""

from typing import Any

import pytest

from openrlhf_bd.config import Config
from openrlhf_bd.driver.remote_teacher import api_options, check_remote_options, is_remote
from openrlhf_bd.driver.resources import stage_actors
from openrlhf_bd.driver.run_folder import run_identity
from openrlhf_bd.engines.arguments import RecordOptions
from openrlhf_bd.errors import ConfigError
from openrlhf_bd.teacher.remote import RemoteOptions, RemoteTeacher

URL = "http://127.0.0.1:8000/v1"


def config_of(*, student: str | None = "student", **teacher: Any) -> Config:
    values = {"api_base": URL, **teacher}
    return Config.model_validate({"teacher": values, "actor": {"model_name_or_path": student}})


def test_url_is_enough() -> None:
    """With a student nothing but the URL must be given; without the URL there is no server."""
    config = config_of()
    check_remote_options(config)
    assert is_remote(config)
    check_remote_options(Config())
    assert not is_remote(Config())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"api_base": "127.0.0.1:8000"}, "form http://HOST:PORT/v1"),
        ({"api_base": "https://me:secret@host/v1"}, "OPENAI_API_KEY"),
        ({"api_base": "https://host/v1?key=secret"}, "OPENAI_API_KEY"),
        ({"model_name_or_path": "teacher"}, "leave one of them out"),
        ({"routes": "a=b", "route_key": "domain"}, r"--teacher\.routes a=b is given beside"),
        ({"api_timeout_s": 1000.0, "api_max_retries": 3}, "longer than --cluster.generate_timeout_s 3600"),
        ({"student": None}, "--actor.model_name_or_path is not given"),
    ],
)
def test_what_does_not_go_together_is_refused(teacher: dict[str, Any], message: str) -> None:
    """A message names the options, and repeats no password."""
    with pytest.raises(ConfigError, match=message) as raised:
        check_remote_options(config_of(**teacher))
    assert "secret" not in str(raised.value)


def test_key_is_in_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key comes from the variable, and neither options nor configuration show it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    options = api_options(config_of())
    assert options.key == "sk-secret"
    assert "sk-secret" not in repr(options) + config_of().model_dump_json()


def test_client_shows_life_while_the_server_thinks() -> None:
    """An online run asks whoever makes rows how far it is; a client has no requests that could be seen to hang."""
    options = RemoteOptions(api_options(config_of()), "m", 64, 20, 4, (0,), RecordOptions(top_p=0.9))
    progress = RemoteTeacher(options).progress()
    assert (progress.num_steps, progress.num_running, progress.is_paused) == (0, 0, False)
    assert 0 <= progress.since_step_s < 60


def test_clients_need_no_gpu() -> None:
    """Generation starts clients; how a server is reached is not part of what a run is."""
    (group,) = stage_actors(config_of(num_engines=2), "generate")
    assert (group.what, group.num_actors, group.num_gpus) == ("teacher clients", 2, 0)
    assert run_identity(config_of()) == run_identity(config_of(api_base="http://other/v1", api_concurrency=2))
    assert run_identity(config_of()) != run_identity(config_of(api_top_logprobs=5))
