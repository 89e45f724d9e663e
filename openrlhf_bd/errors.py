"""Exceptions, and the exit status that each one stands for.

A message says what was found, where, what was expected and what to do. Every class can be pickled, since errors
cross Ray's process boundaries.
"""


class BDError(Exception):
    """Base of every error that openrlhf_bd raises on purpose. A command that ends with one prints its message alone."""

    exit_status = 1


class ConfigError(BDError, ValueError):
    """An option, a YAML key or a combination of options is wrong. Change the option that the message names."""

    exit_status = 2


class DataError(BDError, ValueError):
    """A data set, record, model folder or tokenizer is missing or not what the job needs. No actor has started."""

    exit_status = 2


class RunFolderError(BDError, FileExistsError):
    """An output folder holds another run's files, or another process is writing to it. Nothing was changed."""

    exit_status = 2


class ClusterError(BDError, RuntimeError):
    """The Ray cluster has no room, or an actor died or did not answer in time. The same command again resumes."""

    exit_status = 75


class ResourceError(ClusterError):
    """The cluster lacks CPUs, GPUs, GPU memory, or folders that all nodes share. Raised before any actor starts."""

    exit_status = 2


class StoreError(BDError, OSError):
    """Teacher data on disk is damaged, incomplete or belongs to another run. The message names file and rows."""

    exit_status = 74


class TrainingError(BDError, RuntimeError):
    """A loss or gradient is not finite. Raised on all ranks before the optimizer step; the message names the rows."""

    exit_status = 1
