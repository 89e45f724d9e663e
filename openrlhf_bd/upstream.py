"""OpenRLHF and DeepSpeed as they can be imported on any machine. The only module that imports openrlhf.

OpenRLHF imports flash-attn at the top of one module, although only ring attention and packing use it. Where flash-attn
is not installed, stand-ins with working functions behind them are there while that module is imported, and gone after.
Where it is installed nothing is replaced. Import this module before any other module that needs openrlhf, in the
driver and in every Ray worker.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed.nn
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.muon import original_muon
from torch import Tensor

RING_ATTENTION_MODULE = "openrlhf.models.ring_attn_utils"


def has_flash_attention() -> bool:
    """Whether the flash-attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def is_cpu() -> bool:
    """Whether DeepSpeed trains on this process's CPUs."""
    return bool(get_accelerator().device_name() == "cpu")


def _index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    return torch.index_select(tensor, 0, indices)


def _all_gather(tensor: Tensor, group: Any) -> Tensor:
    return torch.cat(torch.distributed.nn.all_gather(tensor, group=group))


def _stand_ins() -> dict[str, ModuleType]:
    """Modules with what `ring_attn_utils` imports from flash-attn; transformers and torch do the work."""
    from einops import rearrange
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    names = ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    modules = {name: ModuleType(name) for name in names}
    vars(modules["flash_attn.bert_padding"]).update(
        index_first_axis=_index_first_axis, pad_input=_pad_input, rearrange=rearrange, unpad_input=_unpad_input
    )
    vars(modules["flash_attn.utils.distributed"]).update(all_gather=_all_gather)
    return modules


@contextmanager
def _in_sys_modules(modules: dict[str, ModuleType]) -> Iterator[None]:
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _import_ring_attention_without_flash_attention() -> None:
    """Import the one module that needs flash-attn, before its package, so that nothing else sees the stand-ins."""
    stand_ins = _stand_ins()
    openrlhf = importlib.import_module("openrlhf")
    path = Path(openrlhf.__path__[0]) / "models" / "ring_attn_utils.py"
    spec = importlib.util.spec_from_file_location(RING_ATTENTION_MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _in_sys_modules(stand_ins):
        spec.loader.exec_module(module)
    sys.modules[RING_ATTENTION_MODULE] = module
    vars(importlib.import_module("openrlhf.models"))["ring_attn_utils"] = module


if not has_flash_attention() and RING_ATTENTION_MODULE not in sys.modules:
    _import_ring_attention_without_flash_attention()


def _finished(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, finished when it returns; what it returns can still be waited for."""

    @wraps(collective)
    def run(*arguments: Any, **keywords: Any) -> Any:
        work = collective(*arguments, **keywords)
        if work is not None:
            work.wait()
        return work

    return run


def _adapt_deepspeed_to_cpus() -> None:
    # DeepSpeed would compile this operator at start-up, for minutes; gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # ZeRO-3 starts a gather for each parameter and waits for the last one. A CUDA stream finishes them in order; gloo
    # runs two at a time, so an earlier one could still overwrite weights that were set since.
    TorchBackend.all_gather = _finished(TorchBackend.all_gather)
    TorchBackend.all_gather_into_tensor = _finished(TorchBackend.all_gather_into_tensor)
    # DeepSpeed compiles the update of its Muon; as it is written it needs no compiler.
    for name in ("zeropower_via_newtonschulz5", "zeropower_via_gram_newtonschulz", "muon_update"):
        setattr(original_muon, name, inspect.unwrap(getattr(original_muon, name)))
    stage_1_and_2.muon_update = original_muon.muon_update


if is_cpu():
    _adapt_deepspeed_to_cpus()

from openrlhf.datasets.utils import blending_datasets  # noqa: E402
from openrlhf.trainer.ray.launcher import BaseModelActor, RayActorGroup  # noqa: E402
from openrlhf.utils.config import hierarchize  # noqa: E402
from openrlhf.utils.deepspeed import DeepspeedStrategy  # noqa: E402
from openrlhf.utils.logging_utils import TensorboardLogger, WandbLogger  # noqa: E402

__all__ = [
    "BaseModelActor",
    "DeepspeedStrategy",
    "RayActorGroup",
    "TensorboardLogger",
    "WandbLogger",
    "blending_datasets",
    "has_flash_attention",
    "hierarchize",
    "is_cpu",
]
