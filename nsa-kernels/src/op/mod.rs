//! The operator's parts. Each module has argument structs with a shape behind each tensor and one function a direction;
//! letters: N queries, Hq query heads, G KV heads, Dk and Dv head dims, M compression blocks, n selected blocks.

pub mod cmp;
pub mod compress;
pub mod decode;
pub mod dense;
pub mod gate;
pub mod nsa;
pub mod slc;
pub mod win;
