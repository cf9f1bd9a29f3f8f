"""Errors a user can act on: each message says what was expected, what was got and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

from mooring.exit_codes import LOST, USER_ERROR


class MooringError(ValueError):
    """Base of all errors that a user's input can cause.

    Attributes:
        exit_code: what a command ends with that raises it (``mooring.exit_codes``).
    """

    exit_code: int = USER_ERROR


class ConfigError(MooringError):
    """One or more settings are wrong; the message lists all of them."""


class DataError(MooringError):
    """The data set cannot be used as given.

    Attributes:
        everywhere: every rank stops with it at the same place.
    """

    everywhere = False


class WeightsError(MooringError):
    """Pretrained weights are missing, unsafe to load, or for another model."""


class RunFolderError(MooringError):
    """The output folder cannot be written or does not hold what is asked of it."""


class DistributedError(MooringError):
    """The processes of a run cannot work together."""


class RanksLostError(DistributedError):
    """Another process of the run, its machine or the link to it is gone; nothing here is wrong."""

    exit_code = LOST


class MissingDependencyError(MooringError, ImportError):
    """An optional package is needed and is not installed."""


# module -> what to install; the pins are those of requirements.txt
_INSTALL = {
    "nvidia.dali": "nvidia-dali-cuda130==2.4.0",
    "deepspeed": "deepspeed==0.19.8",
    "triton": "triton==3.7.1",
    "transformers": "transformers==5.23.0",
}


def require(module: str, *, needed_for: str) -> ModuleType:
    """Imports an optional module, or says which command installs it.

    Args:
        module: dotted module name, for example ``"nvidia.dali"``.
        needed_for: what the caller was about to do, for the message.

    Raises:
        MissingDependencyError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is None or not (module == err.name or module.startswith(err.name + ".")):
            raise  # the module is there, something it needs is not: do not hide that
        package = _INSTALL.get(module, module)
        raise MissingDependencyError(
            f"{needed_for} needs the package {module}, which is not installed: "
            f"run  python -m pip install '{package}'"
        ) from None
