//! Layer operations against plain f64 loops; their gradients against finite differences; the same bits under any number
//! of threads.

mod adamw;
mod cross_entropy;
mod elementwise;
mod embedding;
mod kit;
mod linear;
mod rmsnorm;
mod rope;
