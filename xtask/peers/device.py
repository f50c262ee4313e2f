"""What peers written with PyTorch share: where they compute, and how a pass is timed there."""

import time

import torch
import wire

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def prepare(request):
    """Tensors are made on the device asked for from here on."""
    torch.manual_seed(1)
    if request["device"] == "cpu":
        torch.set_num_threads(request["threads"])
        wire.limit_memory(request["memory_bytes"])
    else:
        torch.set_default_device(request["device"])
        torch.zeros(1)  # Fails here if this PyTorch has no CUDA.


def kind():
    return torch.get_default_device().type


def is_cuda():
    return kind() == "cuda"


def now():
    """Seconds, once all work is done."""
    if is_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


def random(dtype, *shape):
    return torch.randn(*shape, dtype=dtype) if is_cuda() else torch.randn(*shape).to(dtype)


def turn(attend, inputs, grad, backward):
    """Seconds of a forward pass, and of the backward pass after it."""
    if is_cuda():
        # The first launches after another process has used the device pay for the switch: as much as short passes take.
        passes(attend, inputs, grad, backward)
    return passes(attend, inputs, grad, backward)


def passes(attend, inputs, grad, backward):
    """The same, as the device happens to be."""
    with torch.set_grad_enabled(backward):
        inputs = [x.detach().requires_grad_(backward) for x in inputs]
        start = now()
        out = attend(*inputs)
        seconds = [now() - start]
    if backward:
        start = now()
        torch.autograd.grad(out, inputs, grad)
        seconds.append(now() - start)
    return seconds
