"""Compiles what a package of Triton kernels would launch, without a GPU and without launching it.

While a `Recorder` is active, `kernel[grid](...)` compiles the kernel for the target with the arguments given, once for each
configuration that its autotuner would try, and notes PTX, grid and arguments. The package's own functions run unchanged around
that, on tensors of the processor whose values nobody reads; so block sizes, pruning of configurations and specialization on
arguments are the package's and Triton's.
"""

import os
import re
import subprocess

# Before Triton is imported: positions in its sources are of no use here, and a GPU of this machine is not the target.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompileTimeAssertionFailure
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction, KernelInterface

DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32", torch.int32: "i32"}


class Driver:
    """What Triton's compiler asks a driver about the device."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


class Recorder(TorchFunctionMode):
    """Notes launches, and prefix sums that PyTorch makes between them.

    `chosen` maps keys of autotuners to the configuration to compile; all are compiled for other keys.
    """

    def __init__(self, capability, chosen):
        super().__init__()
        triton.runtime.driver.set_active(Driver(capability))
        self.chosen, self.op = chosen, None
        self.tensors, self.numbers, self.names, self.steps, self.passed = [], {}, {}, [], {}

    def __enter__(self):
        self.launcher = KernelInterface.__getitem__
        KernelInterface.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: self.launch(kernel, grid, args, kwargs)
        return super().__enter__()

    def __exit__(self, *error):
        KernelInterface.__getitem__ = self.launcher
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.cumsum_:
            self.steps.append({"op": self.op, "prefix_sum": self.number(args[0])})
        return result

    def name(self, **tensors):
        """Names inputs, and results to compare."""
        for name, tensor in tensors.items():
            self.names[self.number(tensor)] = name

    def name_passed(self, **parameters):
        """Names what the last kernel with such a parameter was given for it."""
        self.name(**{name: self.passed[parameter] for parameter, name in parameters.items()})

    def number(self, tensor):
        """Of a tensor by its first element. All are kept, so that no address is used again."""
        assert tensor.is_contiguous()
        address = tensor.data_ptr()
        if address not in self.numbers:
            self.numbers[address] = len(self.tensors)
            self.tensors.append(tensor)
        return self.numbers[address]

    def launch(self, kernel, grid, args, kwargs):
        """Compiles a kernel as `kernel[grid](*args, **kwargs)` would have launched it."""
        key, configs = None, [{}]
        while not isinstance(kernel, JITFunction):
            named = {**dict(zip(kernel.arg_names, args)), **kwargs}
            if isinstance(kernel, Heuristics):
                kwargs.update({name: value({**named, **kwargs}) for name, value in kernel.values.items()})
            elif isinstance(kernel, Autotuner):
                kernel.nargs = dict(zip(kernel.arg_names, args))
                key = f"{kernel.base_fn.__name__} {[named[name] for name in kernel.keys]}"
                configs = [config.all_kwargs() for config in kernel.prune_configs(kwargs)]
            else:
                raise TypeError(f"{type(kernel).__name__} around a kernel is not known")
            kernel = kernel.fn
        wanted = [config for config in configs if label(config) == self.chosen.get(key)] or configs
        compiled = [self.compile(kernel, grid, args, {**kwargs, **config}, label(config)) for config in wanted]
        # Configurations may differ in what this kernel has no use for: the same code is run once.
        compiled = list({one["ptx"]: one for one in reversed(compiled) if one}.values())
        if not compiled:
            raise RuntimeError(f"{kernel.fn.__name__}: no configuration compiles")
        self.steps.append({"op": self.op, "launch": {"kernel": kernel.fn.__name__, "key": key, "configs": compiled}})

    def compile(self, function, grid, args, kwargs, config):
        """One configuration, or None where the autotuner would leave it out."""
        try:
            kernel = function.run(*args, grid=grid, warmup=True, **kwargs)
        except (OutOfResources, CompileTimeAssertionFailure, PTXASError):
            return None
        if kernel.metadata.global_scratch_size:
            raise NotImplementedError(f"{kernel.name} needs scratch memory")
        bound = {**dict(zip(function.arg_names, args)), **kwargs}
        grid = grid(bound) if callable(grid) else grid
        self.passed.update({name: value for name, value in bound.items() if isinstance(value, torch.Tensor)})
        kept = [name for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        return {
            "config": config,
            "entry": kernel.metadata.name,
            "ptx": kernel.asm["ptx"],
            "grid": [*grid, 1, 1][:3],
            "warps": kernel.metadata.num_warps,
            "shared_bytes": kernel.metadata.shared,
            "stack_bytes": stack_bytes(kernel),
            "arguments": [self.argument(bound[name]) for name in kept],
        }

    def argument(self, value):
        if isinstance(value, torch.Tensor):
            return {"tensor": self.number(value)}
        return {"float": value} if isinstance(value, float) else {"int": value}

    def reply(self):
        tensors = [
            {"name": self.names.get(number), "dtype": DTYPES[tensor.dtype], "len": tensor.numel()}
            for number, tensor in enumerate(self.tensors)
        ]
        return {"tensors": tensors, "steps": self.steps}


def stack_bytes(kernel):
    """Of a thread in the machine code: registers that the assembler had to spill."""
    code = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    text = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", code], text=True)
    return int(re.search(r"STACK:(\d+)", text)[1])


def label(config):
    """Short text of a configuration."""
    return " ".join(f"{name}={value}" for name, value in config.items() if value is not None and name != "num_ctas")
