// Operations that take each element by itself: sums, the logistic function, SwiGLU, rounded copies.
//
// Grid: a thread takes VECTOR elements at a time, threads along all of them; the last elements one by one.
// Shared memory: none. Bytes: each operand once; all are bound by memory (at most 20 FLOP and one exponential an element).
// Order of summation: none has sums of more than two terms. An output may be an input (add_accumulate).
//
// budget: kernel=add_forward threads=256 registers=40 spills=0 shared=0
// budget: kernel=sigmoid_forward threads=256 registers=40 spills=0 shared=0
// budget: kernel=sigmoid_backward threads=256 registers=48 spills=0 shared=0
// budget: kernel=swiglu_forward threads=256 registers=48 spills=0 shared=0
// budget: kernel=swiglu_backward threads=256 registers=64 spills=0 shared=0
// budget: kernel=round_forward threads=256 registers=40 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

// Calls body with the first element of VECTOR whole ones, or of single ones.
template <class Body>
__device__ __forceinline__ void for_elements(i64 count, Body body) {
    const i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * VECTOR;
    if (at + VECTOR <= count) {
        body(at, Size<VECTOR>());
    } else {
        for (i64 i = at; i < count; ++i) body(i, Size<1>());
    }
}

extern "C" __global__ void __launch_bounds__(256) add_forward(const __grid_constant__ AddParams p) {
    for_elements(p.count, [&](i64 at, auto size) {
        constexpr int N = decltype(size)::value;
        float a[N], b[N];
        load<N>(p.a + at, a);
        load<N>(p.b + at, b);
#pragma unroll
        for (int i = 0; i < N; ++i) a[i] += b[i];
        store<N>(p.y + at, a);
    });
}

// 1 / (1 + e^-x) with the exponential of -|x| in either half: it never overflows, and far negative x keep their digits.
__device__ __forceinline__ float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

extern "C" __global__ void __launch_bounds__(256) sigmoid_forward(const __grid_constant__ SigmoidForwardParams p) {
    for_elements(p.count, [&](i64 at, auto size) {
        constexpr int N = decltype(size)::value;
        float x[N];
        load<N>(p.x + at, x);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = sigmoid(x[i]);
        store<N>(p.y + at, x);
    });
}

extern "C" __global__ void __launch_bounds__(256) sigmoid_backward(const __grid_constant__ SigmoidBackwardParams p) {
    for_elements(p.count, [&](i64 at, auto size) {
        constexpr int N = decltype(size)::value;
        float y[N], dy[N];
        load<N>(p.y + at, y);
        load<N>(p.dy + at, dy);
#pragma unroll
        for (int i = 0; i < N; ++i) dy[i] = dy[i] * y[i] * (1.0f - y[i]);
        store<N>(p.dx + at, dy);
    });
}

extern "C" __global__ void __launch_bounds__(256) swiglu_forward(const __grid_constant__ SwigluForwardParams p) {
    for_elements(p.count, [&](i64 at, auto size) {
        constexpr int N = decltype(size)::value;
        float gate[N], up[N];
        load<N>(p.gate + at, gate);
        load<N>(p.up + at, up);
#pragma unroll
        for (int i = 0; i < N; ++i) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
        store<N>(p.y + at, gate);
    });
}

extern "C" __global__ void __launch_bounds__(256) swiglu_backward(const __grid_constant__ SwigluBackwardParams p) {
    for_elements(p.count, [&](i64 at, auto size) {
        constexpr int N = decltype(size)::value;
        float gate[N], up[N], dy[N];
        load<N>(p.gate + at, gate);
        load<N>(p.up + at, up);
        load<N>(p.dy + at, dy);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float s = sigmoid(gate[i]);
            up[i] = dy[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
            gate[i] = dy[i] * gate[i] * s;
        }
        store<N>(p.d_gate + at, up);
        store<N>(p.d_up + at, gate);
    });
}

extern "C" __global__ void __launch_bounds__(256) round_forward(const __grid_constant__ RoundParams p) {
    for_elements(p.count, [&](i64 at, auto size) {
        constexpr int N = decltype(size)::value;
        float x[N];
        load<N>(p.x + at, x);
        store<N>(p.y + at, x);
    });
}
