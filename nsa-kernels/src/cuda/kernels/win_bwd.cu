// Gradients of sliding-window attention (`win`, SPEC 2.3): see band_bwd.cuh.
//
// budget: kernel=win_row_facts threads=256 registers=40 spills=0 shared=0
// budget: kernel=win_query_gradients threads=128 registers=255 spills=0 shared=65536
// budget: kernel=win_query_gradients arch=sm_90a threads=384 registers=168 spills=0 shared=163856
// budget: kernel=win_key_gradients threads=128 registers=255 spills=0 shared=66560
// budget: kernel=win_key_gradients arch=sm_90a threads=256 registers=255 spills=0 shared=200720
// budget: kernel=win_add_parts threads=256 registers=64 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "band_bwd.cuh"

extern "C" __global__ void __launch_bounds__(256) win_row_facts(const __grid_constant__ BandBackwardParams p) { row_facts(p); }

extern "C" __global__ void __launch_bounds__(QUERY_THREADS, 1) win_query_gradients(const __grid_constant__ BandBackwardParams p) {
    query_gradients<Window>(p);
}

extern "C" __global__ void __launch_bounds__(KEY_THREADS, 1) win_key_gradients(const __grid_constant__ BandBackwardParams p) {
    key_gradients_of<Window>(p);
}

extern "C" __global__ void __launch_bounds__(256) win_add_parts(const __grid_constant__ BandBackwardParams p) { add_parts<Window>(p); }
