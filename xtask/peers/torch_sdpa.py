"""PyTorch's full attention for `cargo xtask bench --peer torch`; wire.py says how they talk.

Several ways to write it are tried, and the fastest stands for PyTorch. Tensors are `[batch, heads, tokens, dim]`,
the layout that its CPU kernels like best.
"""

import device
import torch
import wire
from device import DTYPES, random
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

# The ways are compared at the length itself or at this one; beyond it none that keeps a score for every pair takes part.
TRIAL_TOKENS = 4096
CUDA_TRIAL_TOKENS = 16384
TRIALS = 3
# Seconds of steps in one sample of decoding.
SAMPLE_S = 0.05


# The heads of a group share keys and values: a view without a copy when there is one group.
def expand(x, repeat):
    return x.unsqueeze(2).expand(-1, -1, repeat, -1, -1).flatten(1, 2)


def grouped(q, k, v):
    """q [1, H, T, Dk], k [1, G, T, Dk], v [1, G, T, Dv]"""
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def expanded(q, k, v):
    repeat = q.shape[1] // k.shape[1]
    return sdpa(q, expand(k, repeat), expand(v, repeat), is_causal=True)


def repeated(q, k, v):
    repeat = q.shape[1] // k.shape[1]
    return sdpa(q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), is_causal=True)


def padded(attend):
    """The fused CPU kernel wants keys and values of one width."""

    def run(q, k, v):
        dim_qk, dim_v = q.shape[-1], v.shape[-1]
        if dim_v <= dim_qk:
            return attend(q, k, pad(v, (0, dim_qk - dim_v)))[..., :dim_v]
        # Wider keys of zeros leave the scores as they are; the queries make up for the scale by the wider width.
        q = pad(q * (dim_v / dim_qk) ** 0.5, (0, dim_v - dim_qk))
        return attend(q, pad(k, (0, dim_v - dim_qk)), v)

    return run


def products(q, k, v):
    """Matrix products and a softmax over all pairs, the heads of a group as one matrix."""
    groups, tokens = k.shape[1], q.shape[2]
    rows = q.reshape(groups, -1, q.shape[-1]) * q.shape[-1] ** -0.5
    mask = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores = (rows @ k[0].transpose(1, 2)).view(groups, -1, tokens, tokens).masked_fill(mask, float("-inf"))
    return (scores.softmax(-1).view(groups, -1, tokens) @ v[0]).view(1, q.shape[1], tokens, -1)


def cudnn(q, k, v):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return grouped(q, k, v)


FUSED = {"enable_gqa": grouped, "expanded heads": expanded, "repeated heads": repeated}
PADDED = {f"{name}, padded": padded(attend) for name, attend in FUSED.items()}


class Attention:
    """Forward and backward over one sequence."""

    def __init__(self, job):
        dtype, tokens = DTYPES[job["dtype"]], job["tokens"]
        self.backward = job["backward"]
        self.inputs = [
            random(dtype, 1, job["heads"], tokens, job["dim_qk"]),
            random(dtype, 1, job["kv_heads"], tokens, job["dim_qk"]),
            random(dtype, 1, job["kv_heads"], tokens, job["dim_v"]),
        ]
        self.grad = random(dtype, 1, job["heads"], tokens, job["dim_v"])

    def turn(self, attend, backward):
        """Seconds of a forward pass, and of the backward pass after it."""
        return device.turn(attend, self.inputs, self.grad, backward)


def fastest(names, seconds):
    """The name with the least of `seconds(name)`; one that fails (no memory, no such kernel) is out."""
    times, errors = {}, []
    for name in names:
        try:
            times[name] = seconds(name)
        except Exception as error:
            errors.append(f"{name}: {str(error).splitlines()[0]}")
    if not times:
        raise RuntimeError("; ".join(errors))
    return times


class Peer:
    def __init__(self):
        self.current = None
        # Fastest ways at a trial's length, by everything else that they depend on.
        self.known = {}

    def hello(self, request):
        device.prepare(request)
        return {"version": torch.__version__}

    def attention(self, job):
        """Makes the inputs and chooses the ways; the reply names them."""
        self.current = None
        trial = dict(job, tokens=min(job["tokens"], CUDA_TRIAL_TOKENS if device.is_cuda() else TRIAL_TOKENS))
        ways = dict(FUSED if job["dim_qk"] == job["dim_v"] else {**FUSED, **PADDED})
        if job["tokens"] <= TRIAL_TOKENS:
            ways["matrix products"] = products
        if device.is_cuda():
            ways["cuDNN"] = cudnn
        key = tuple(sorted(trial.items())) + tuple(ways)
        if key not in self.known:
            self.known[key] = self.choose(trial, ways)
        forward, backward = self.known[key]
        self.current = Attention(job), ways[forward], ways[backward]
        return {"forward": forward, "backward": backward}

    def choose(self, trial, ways):
        attention = Attention(trial)

        def best(name):
            turns = [attention.turn(ways[name], trial["backward"]) for _ in range(TRIALS)]
            return [min(passes) for passes in zip(*turns)]

        times = fastest(ways, best)
        return [min(times, key=lambda name: times[name][at]) for at in (0, -1)]

    def turn(self, _):
        attention, forward, backward = self.current
        if not attention.backward:
            return {"forward": attention.turn(forward, False)[0]}
        seconds = attention.turn(backward, True)
        # Where another way is the fastest forward, it runs on its own.
        first = seconds[0] if forward is backward else attention.turn(forward, False)[0]
        return {"forward": first, "backward": seconds[1]}

    def decode(self, job):
        """Makes the caches of `copies` layers and chooses the way; the reply names it."""
        self.current = None
        decode = Decode(job)
        times = fastest(decode.ways, lambda name: min(decode.step(name, 0.0) for _ in range(TRIALS)))
        way = min(times, key=times.get)
        decode.keep(way)
        self.current = decode, way
        return {"way": way}

    def step(self, _):
        decode, way = self.current
        return {"seconds": decode.step(way, SAMPLE_S)}

    def drop(self, _):
        self.current = None
        return {}


class Decode:
    """One query a layer of each sequence of a batch, over caches of `tokens`; as many layers as do not fit the processor's
    caches."""

    def __init__(self, job):
        dtype, tokens, groups, batch = DTYPES[job["dtype"]], job["tokens"], job["kv_heads"], job["batch"]
        copies, repeat = range(job["copies"]), job["heads"] // job["kv_heads"]
        self.q = [random(dtype, batch, job["heads"], 1, job["dim_qk"]) for _ in copies]
        self.k = [random(dtype, batch, groups, tokens, job["dim_qk"]) for _ in copies]
        self.v = [random(dtype, batch, groups, tokens, job["dim_v"]) for _ in copies]
        # Keys may as well be kept transposed.
        self.kt = [k.flatten(0, 1).transpose(1, 2).contiguous() for k in self.k]
        scale = job["dim_qk"] ** -0.5
        self.graphs = {}

        def rows(i):
            # The query heads of a group as the rows of one matrix: no mask is needed.
            return self.q[i].view(batch, groups, repeat, -1)

        def product(i, kt):
            # Groups of all sequences beside each other.
            return ((rows(i).flatten(0, 1) * scale) @ kt).softmax(-1) @ self.v[i].flatten(0, 1)

        self.ways = {
            "enable_gqa": lambda i: sdpa(self.q[i], self.k[i], self.v[i], enable_gqa=True),
            "expanded heads": lambda i: sdpa(self.q[i], expand(self.k[i], repeat), expand(self.v[i], repeat)),
            "heads as rows": lambda i: sdpa(rows(i), self.k[i], self.v[i]),
            "grouped matmul": lambda i: product(i, self.k[i].flatten(0, 1).transpose(1, 2)),
            "grouped matmul, keys transposed": lambda i: product(i, self.kt[i]),
        }

    def keep(self, way):
        """Frees the form of the keys that `way` does not use."""
        self.graphs = {name: graph for name, graph in self.graphs.items() if name == way}
        if way.endswith("transposed"):
            self.k = None
        else:
            self.kt = None

    def step(self, way, at_least_s):
        """Seconds of one step, the mean over rounds through all layers. A device is waited for after 1, 2, 4 ... rounds, as it
        is for ours."""
        run, steps, rounds = self.ways[way], 0, 1

        def eager():
            for i in range(len(self.q)):
                run(i)

        with torch.inference_mode():
            steps_of_all = self.recorded(way, eager) if device.is_cuda() else eager
            start = device.now()
            while True:
                for _ in range(rounds):
                    steps_of_all()
                steps += rounds * len(self.q)
                seconds = device.now() - start
                if seconds >= at_least_s:
                    return seconds / steps
                rounds *= 2 if device.is_cuda() else 1

    def recorded(self, way, steps):
        """The steps as one CUDA graph."""
        if way not in self.graphs:
            steps()
            torch.cuda.synchronize()
            self.graphs[way] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[way]):
                steps()
        return self.graphs[way].replay


peer = Peer()
wire.serve({call: getattr(peer, call) for call in ("hello", "attention", "turn", "decode", "step", "drop")})
