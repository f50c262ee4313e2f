// Sums over the rows of a matrix, in two steps: each part of the rows into a row of partial sums, then these in order.
//   column_sums:  partial[part, c] = sum over rows of the part of x[row, c];   add_partials:  y[c] += sum_part partial[part, c]
// and the same in double, where a sum's own error would not average out:  column_sums_double, part_totals (which writes).
//
// Grid: a thread a column, columns along x, parts along y. Shared memory: none. Bytes: x once, partial sums twice.
// Order of summation: rows of a part ascending, parts ascending; the number of parts depends on the number of rows alone.
//
// budget: kernel=column_sums threads=256 registers=40 spills=0 shared=0
// budget: kernel=add_partials threads=256 registers=32 spills=0 shared=0
// budget: kernel=column_sums_double threads=256 registers=48 spills=0 shared=0
// budget: kernel=part_totals threads=256 registers=40 spills=0 shared=0
#include "element.cuh"
#include "config.cuh"
#include "params.cuh"

extern "C" __global__ void __launch_bounds__(256) column_sums(const __grid_constant__ ColumnSumsParams p) {
    const i64 column = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= p.columns) return;
    const i64 first = i64(blockIdx.y) * p.part_rows;
    const i64 end = first + p.part_rows < p.rows ? first + p.part_rows : p.rows;
    float sum = 0.0f;
    for (i64 row = first; row < end; ++row) sum += to_float(p.x[row * p.columns + column]);
    p.partial[i64(blockIdx.y) * p.columns + column] = sum;
}

extern "C" __global__ void __launch_bounds__(256) add_partials(const __grid_constant__ AddPartialsParams p) {
    const i64 column = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= p.columns) return;
    float sum = 0.0f;
    for (i64 part = 0; part < p.parts; ++part) sum += p.partial[part * p.columns + column];
    p.y[column] += sum;
}

extern "C" __global__ void __launch_bounds__(256) column_sums_double(const __grid_constant__ ColumnSumsDoubleParams p) {
    const i64 column = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= p.columns) return;
    const i64 first = i64(blockIdx.y) * p.part_rows;
    const i64 end = first + p.part_rows < p.rows ? first + p.part_rows : p.rows;
    double sum = 0.0;
    for (i64 row = first; row < end; ++row) sum += double(p.x[row * p.columns + column]);
    p.partial[i64(blockIdx.y) * p.columns + column] = sum;
}

extern "C" __global__ void __launch_bounds__(256) part_totals(const __grid_constant__ PartTotalsParams p) {
    const i64 column = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= p.columns) return;
    double sum = 0.0;
    for (i64 part = 0; part < p.parts; ++part) sum += p.partial[part * p.columns + column];
    p.totals[column] = sum;
}
