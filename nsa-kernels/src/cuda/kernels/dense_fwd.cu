// Full causal attention (`dense`, SPEC 1): see band_fwd.cuh.
//
// budget: kernel=dense_forward threads=128 registers=255 spills=0 shared=65536
// budget: kernel=dense_forward arch=sm_90a threads=256 registers=128 spills=0 shared=98320
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "band_fwd.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) dense_forward(const __grid_constant__ BandForwardParams p) {
    band_forward<Dense>(p, Nothing());
}
