"""Which models an evaluation compares, as they are written: `label=path`, and a temperature where it is another."""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf_bd.errors import ConfigError

_TEMPERATURE = "@temperature="


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model and its sampler.

    Attributes:
        path: folder, or name on the hub.
        temperature: of its sampler; None: that of all.
    """

    path: str
    temperature: float | None = None

    @staticmethod
    def parse(text: str) -> EvaluatedModel:
        """`PATH`, or `PATH@temperature=T`: the same model, sampled at another temperature than the others.

        Raises:
            ConfigError: there is no path, or the temperature is no number of at least 0.
        """
        path, found, number = text.strip().partition(_TEMPERATURE)
        if not path.strip():
            raise ConfigError(f"model {text!r}: found no path; expected PATH or PATH{_TEMPERATURE}T")
        if not found:
            return EvaluatedModel(path)
        try:
            temperature = float(number)
        except ValueError:
            temperature = -1.0
        if not 0 <= temperature < float("inf"):
            raise ConfigError(
                f"model {text!r}: the temperature is {number!r}; expected a number of at least 0 (0 is greedy)"
            )
        return EvaluatedModel(path.strip(), temperature)


def parse_models(text: str) -> dict[str, str]:
    """Models by label of `--models label=PATH,label=PATH`; `EvaluatedModel.parse` reads each.

    Raises:
        ConfigError: an entry has no label or no path, or two have the same label.
    """
    found: dict[str, str] = {}
    for entry in text.split(","):
        label, equals, model = (part.strip() for part in entry.partition("="))
        if not (label and equals and model) or label.endswith(_TEMPERATURE.rstrip("=")):
            raise ConfigError(
                f"--models has {entry.strip()!r}; expected label=PATH entries separated by commas, each PATH a "
                f"model folder or a name on the hub, with {_TEMPERATURE}T behind it to sample at another temperature"
            )
        if label in found:
            raise ConfigError(f"--models names {label!r} twice; give each model a label of its own")
        EvaluatedModel.parse(model)
        found[label] = model
    return found
