//! The operator's parts against the reference: φ, the gate, the whole, decoding.

mod compress;
mod decode;
mod gate;
mod kit;
mod nsa;
