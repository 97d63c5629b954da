"""Names of devices: one, several, or all GPUs of this machine."""

from collections.abc import Sequence

import torch

from ..errors import QuantizationError
from ..sources.source import CPU

__all__ = ["ALL", "Devices", "parse_devices", "same_model", "usable_device", "without_number"]

ALL = "all"

Devices = str | torch.device | Sequence[str | torch.device] | None
"""Devices of a run: None for the first GPU, or the CPU if there is none; names separated by commas; "all"; or a sequence."""


def parse_devices(devices: Devices) -> tuple[torch.device, ...]:
    """The devices of a run, each of which works.

    "all" means the GPUs of the same model as the first one: others may round ties differently, and the same run has to
    write the same bytes. "cpu:0,cpu:1" are two processes on the CPU.

    Raises:
        QuantizationError: one does not exist or does not work, is named twice, or is another kind of device or GPU.
    """
    if devices == ALL:
        if not torch.cuda.is_available():
            raise QuantizationError(
                "'all' asks for all GPUs, and none is found here; leave the device out to use the CPU.", option="device"
            )
        devices = same_model(torch.device("cuda", 0))
    if devices is None or isinstance(devices, torch.device):
        return (usable_device(devices),)
    names = [name.strip() for name in devices.split(",")] if isinstance(devices, str) else list(devices)
    if not names:
        raise QuantizationError(
            "No device is named; name one, such as cuda:0, or leave the option out.", option="device"
        )
    chosen = [usable_device(name) for name in names]
    if len(chosen) > 1:
        chosen = [torch.device("cuda", 0) if str(device) == "cuda" else device for device in chosen]
        _check_together(chosen)
    return tuple(chosen)


def same_model(device: torch.device) -> tuple[torch.device, ...]:
    """A GPU and all others of its model that this process sees."""
    first = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    every = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    model = torch.cuda.get_device_name(first)
    return first, *(each for each in every if each != first and torch.cuda.get_device_name(each) == model)


def _check_together(devices: Sequence[torch.device]) -> None:
    for index, device in enumerate(devices):
        if device in devices[:index]:
            raise QuantizationError(f"The device '{device}' is named twice; name each once.", option="device")
        if device.type != devices[0].type:
            raise QuantizationError(
                f"The devices '{devices[0]}' and '{device}' are of different kinds, which round ties differently; "
                "name devices of one kind.",
                option="device",
            )
        if device.type == "cuda" and (model := torch.cuda.get_device_name(device)) != torch.cuda.get_device_name(
            devices[0]
        ):
            raise QuantizationError(
                f"'{devices[0]}' is {torch.cuda.get_device_name(devices[0])} and '{device}' is {model}, which may round "
                "ties differently; name cards of one model.",
                option="device",
            )


def without_number(device: torch.device) -> torch.device:
    """The device of the arithmetic: "cpu:1" is the name of a process, whose tensors are on the CPU."""
    return CPU if device.type == "cpu" else device


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None for the first GPU, or the CPU if there is none.

    Raises:
        QuantizationError: the device does not exist or does not work.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QuantizationError(f"The device '{device}' cannot be used here: {str(error).splitlines()[0]}") from None
    return chosen
