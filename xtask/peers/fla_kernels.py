"""Kernels of flash-linear-attention's sparse attention for `cargo xtask bench count --peer fla`; wire.py says how they talk.

Compressed blocks are averages of as many tokens as a block that is selected, and do not overlap.
"""

import os
import pathlib

# What Triton compiled stays with what was installed.
os.environ.setdefault("TRITON_CACHE_DIR", str(pathlib.Path(__file__).parents[2] / "target/peers/triton"))

import triton_kernels  # Before the packages: it says how Triton is imported.
import torch
import wire
from fla import __version__
from fla.ops.nsa import compression, parallel


def hello(_):
    return {"version": __version__}


def kernels(job):
    recorder = triton_kernels.Recorder(job["capability"], job["chosen"])
    with recorder:
        attention(recorder, job)
    return recorder.reply()


def attention(recorder, job):
    """Calls the package's functions as its `parallel_nsa` and their gradients do, without gates."""
    tokens, heads, groups = job["tokens"], job["heads"], job["kv_heads"]
    size, count = job["select_block"], job["select_count"]
    blocks, scale = tokens // size, job["dim_qk"] ** -0.5

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(1, *shape, dtype=dtype)

    q, do = empty(tokens, heads, job["dim_qk"]), empty(tokens, heads, job["dim_v"])
    k, v = empty(tokens, groups, job["dim_qk"]), empty(tokens, groups, job["dim_v"])
    k_cmp, v_cmp = empty(blocks, groups, job["dim_qk"]), empty(blocks, groups, job["dim_v"])
    lists = empty(tokens, groups, count, dtype=torch.int32)
    recorder.name(q=q, k=k, v=v, do=do, k_cmp=k_cmp, v_cmp=v_cmp, block_indices=lists)
    recorder.op = "cmp forward"
    o_cmp, lse_cmp = compression.parallel_nsa_compression_fwd(q, k_cmp, v_cmp, tokens, size, scale)
    parallel.parallel_nsa_topk(q, k_cmp, tokens, lse_cmp, count, size, scale)
    recorder.op = "slc forward"
    o_slc, lse_slc = parallel.parallel_nsa_fwd(q, k, v, lists, count, size, scale)
    recorder.name(o_cmp=o_cmp, o_slc=o_slc)
    if job["backward"]:
        recorder.op = "cmp backward"
        compression.parallel_nsa_compression_bwd(q, k_cmp, v_cmp, o_cmp, lse_cmp, do, size, scale)
        recorder.name_passed(dq="dq_cmp", dk="dk_cmp", dv="dv_cmp")
        recorder.op = "slc backward"
        parallel.parallel_nsa_bwd(q, k, v, o_slc, lse_slc, do, lists, count, size, scale)
        recorder.name_passed(dq="dq_slc", dk="dk_slc", dv="dv_slc")


wire.serve({"hello": hello, "kernels": kernels})
