//! Whole programs on a CUDA device: training and decoding on the simulator against the CPU.

mod decoding;
mod kit;
mod training;
