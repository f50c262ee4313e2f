// Sliding-window attention (`win`, SPEC 2.3): see band_fwd.cuh.
//
// budget: kernel=win_forward threads=128 registers=255 spills=0 shared=65536
// budget: kernel=win_forward arch=sm_90a threads=256 registers=128 spills=0 shared=98320
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"
#include "band_fwd.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS) win_forward(const __grid_constant__ BandForwardParams p) {
    band_forward<Window>(p, Nothing());
}
