//! Tests of the decoder against a plain f64 model, against itself and against broken files.
#![forbid(unsafe_code)]

mod cli;
mod files;
mod generate;
mod kit;
mod parity;
mod reference;
mod session;
