//! The simulator through its library: kernels from PTX text, no driver.

mod counters;
mod defects;
mod hardware;
mod kit;
mod malformed;
mod nvcc;
mod opcodes;
mod programs;
mod triton;
