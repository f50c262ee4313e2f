//! The simulator through its library: kernels from PTX text, no driver.

mod collectives;
mod counters;
mod coverage;
mod defects;
mod hardware;
mod kit;
mod malformed;
mod nvcc;
mod opcodes;
mod pipes;
mod programs;
mod triton;
