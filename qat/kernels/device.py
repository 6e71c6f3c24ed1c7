"""An NVIDIA GPU as the kernels of `csrc/cuda/` see it: whether they run on it, and how they are launched."""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qat.kernels import cubins
from qat.kernels.plan import Launch


def run(launch: Launch, device: torch.device, *arguments: Tensor | int | float | None) -> None:
    """Launch a kernel on torch's current stream.

    Args:
        launch: which and how.
        device: a CUDA device.
        arguments: tensors are passed as their address, None as a null pointer, numbers as C ints and floats.

    Raises:
        CompileError: it cannot be compiled.
    """
    cubins.nvrtc_version()  # says so where the packages are missing
    from cuda.core import LaunchConfig
    from cuda.core import launch as start

    index = torch.cuda.current_device() if device.index is None else device.index
    # The kernels are written for programmatic dependent launch; it stays off until it has been seen to work on a GPU,
    # and must stay off where a kernel follows the `repack` that wrote its weights.
    config = LaunchConfig(grid=launch.grid, block=launch.threads, shmem_size=launch.shared_bytes)
    with torch.cuda.device(index):
        kernel = _kernel(launch.name, launch.shared_bytes, index)
        start(torch.cuda.current_stream(index), config, kernel, *map(as_argument, arguments))


def as_argument(value: Tensor | int | float | None) -> Any:
    """How cuda.core takes it: a Python int is a pointer, a ctypes.c_int a C int, a ctypes.c_float a C float."""
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value)


@cache
def _kernel(name: str, shared_bytes: int, index: int) -> Any:
    """A kernel, loaded, and allowed more shared memory than the 48 KiB that need no permission."""
    from cuda.bindings import driver
    from cuda.core import Device, ObjectCode

    Device(index).set_current()
    cubin = cubins.load(name, cubins.architecture(torch.cuda.get_device_capability(index)))
    kernel = ObjectCode.from_cubin(cubin.code).get_kernel(cubin.symbol)
    if shared_bytes > 48 * 1024:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, driver.CUdevice(index))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} needs {shared_bytes} bytes of shared memory: {status.name}")
    return kernel


def unavailable(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, or None."""
    return _unavailable(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _unavailable(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < cubins.OLDEST:
        return f"{torch.cuda.get_device_name(index)} is sm_{capability[0]}{capability[1]}, the kernels need sm_80"
    try:
        cubins.nvrtc_version()
    except cubins.CompileError as error:
        return str(error)
    return None


@cache
def _multiprocessor_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many `device` has."""
    return _multiprocessor_count(torch.cuda.current_device() if device.index is None else device.index)
