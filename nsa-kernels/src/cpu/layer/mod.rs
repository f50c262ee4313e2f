//! Bodies of the layer operations.
//!
//! Rows are split among threads in tasks whose size depends on the shape alone; whatever sums over rows adds the tasks'
//! partial sums in order, so that no result depends on the number of threads.

pub mod adamw;
pub mod add;
mod blocked;
pub mod copy;
pub mod cross_entropy;
pub mod embedding;
pub mod linear;
mod matmul;
pub(crate) mod par;
pub mod rmsnorm;
pub mod rope;
pub mod round;
pub mod sigmoid;
pub mod swiglu;
