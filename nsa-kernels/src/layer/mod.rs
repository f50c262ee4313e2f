//! Layer operations that training and decoding share: what a transformer needs around the attention operator.
//!
//! Each module has argument structs with a shape behind each tensor and one function a direction. `T` is the type that
//! activations are stored in, `W` that of weights, A = `T::Acc` the type that sums and gradients are in. Letters: N rows
//! (tokens), C channels, I and O the inputs and outputs of a linear layer, F the hidden width of an MLP, H heads, D head
//! dim, V vocabulary, P parameters.
//!
//! Inputs may be strided by rows; outputs are row-major without gaps. Results have the same bits under any number of
//! threads.

pub mod adamw;
pub mod add;
pub mod copy;
pub mod cross_entropy;
pub mod embedding;
pub mod linear;
pub mod rmsnorm;
pub mod rope;
pub mod round;
pub mod sigmoid;
pub mod swiglu;
