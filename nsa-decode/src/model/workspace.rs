//! Memory of one forward pass, kept from pass to pass.

use super::net::Activation;
use crate::Result;
use bytemuck::Pod;
use nsa_kernels::op::decode;
use nsa_kernels::{Backend, Buffer};

macro_rules! workspace {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $len:literal),* $(,)?) => {
        /// Buffers of one forward pass over N tokens of S sequences. They only grow, and what they hold between passes
        /// means nothing.
        #[derive(Debug)]
        pub(crate) struct Workspace<T: Activation> {
            $($(#[$doc])* #[doc = concat!(" `", $len, "`.")] pub(crate) $name: $type,)*
            /// What the steps of all layers leave for the next ones.
            pub(crate) decode: decode::Workspace<T>,
        }

        impl<T: Activation> Workspace<T> {
            pub(crate) fn new(backend: &Backend, layers: usize) -> Self {
                Self { $($name: backend.alloc(0),)* decode: decode::Workspace::new(layers) }
            }

            /// Elements of all buffers. They only grow: while the number is the same, so are the buffers.
            pub(crate) fn len(&self) -> usize {
                [$(self.$name.len()),*].iter().sum()
            }
        }
    };
}

workspace! {
    /// Tokens.
    tokens: Buffer<u32> = "[N]",
    /// Their positions.
    positions: Buffer<i32> = "[N]",
    /// Residual stream.
    x: Buffer<T> = "[N, C]",
    /// Its norm, input of both halves of a layer.
    h: Buffer<T> = "[N, C]",
    /// Queries before their norm.
    raw_q: Buffer<T> = "[N, Hq, Dk]",
    /// Keys of slc, or of full attention, before their norm.
    raw_k_slc: Buffer<T> = "[N, G, Dk]",
    /// Keys of win before their norm.
    raw_k_win: Buffer<T> = "[N, G, Dk]",
    /// Queries.
    q: Buffer<T> = "[N, Hq, Dk]",
    /// Keys of cmp, before φ.
    k_cmp: Buffer<T> = "[N, G, Dk]",
    /// Keys of slc, or of full attention.
    k_slc: Buffer<T> = "[N, G, Dk]",
    /// Keys of win.
    k_win: Buffer<T> = "[N, G, Dk]",
    /// Values of cmp, before φ.
    v_cmp: Buffer<T> = "[N, G, Dv]",
    /// Values of slc, or of full attention.
    v_slc: Buffer<T> = "[N, G, Dv]",
    /// Values of win.
    v_win: Buffer<T> = "[N, G, Dv]",
    /// Gates before the sigmoid.
    gate_logits: Buffer<T> = "[N, 3·Hq]",
    /// Gates.
    gates: Buffer<T> = "[N, Hq, 3]",
    /// Output of cmp.
    o_cmp: Buffer<T> = "[N, Hq, Dv]",
    /// Output of slc.
    o_slc: Buffer<T> = "[N, Hq, Dv]",
    /// Output of win.
    o_win: Buffer<T> = "[N, Hq, Dv]",
    /// Log-sum-exp of cmp.
    lse_cmp: Buffer<f32> = "[N, Hq]",
    /// Log-sum-exp of slc, or of full attention.
    lse_slc: Buffer<f32> = "[N, Hq]",
    /// Log-sum-exp of win.
    lse_win: Buffer<f32> = "[N, Hq]",
    /// Selected blocks.
    indices: Buffer<i32> = "[N, G, n]",
    /// Attention's output.
    o: Buffer<T> = "[N, Hq, Dv]",
    /// The MLP's gate.
    mlp_gate: Buffer<T> = "[N, F]",
    /// The MLP's other half.
    mlp_up: Buffer<T> = "[N, F]",
    /// Their product.
    mlp: Buffer<T> = "[N, F]",
    /// Raw keys of the blocks that this pass completes, ring and new ones.
    tail_k: Buffer<T> = "[.., G, Dk]",
    /// Raw values of the same.
    tail_v: Buffer<T> = "[.., G, Dv]",
    /// New compressed keys before their norm.
    raw_blocks: Buffer<T> = "[.., G, Dk]",
    /// New compressed keys.
    k_blocks: Buffer<T> = "[.., G, Dk]",
    /// New compressed values.
    v_blocks: Buffer<T> = "[.., G, Dv]",
    /// Positions of the new compressed keys.
    block_positions: Buffer<i32> = "[..]",
    /// Keys of win that the queries of this pass reach.
    reach_k: Buffer<T> = "[.., G, Dk]",
    /// Values of win that they reach.
    reach_v: Buffer<T> = "[.., G, Dv]",
    /// Rows of the residual stream that logits are wanted of.
    last: Buffer<T> = "[S or N, C]",
    /// Their norm.
    last_norm: Buffer<T> = "[S or N, C]",
    /// The same in the type of sums, if it is another one.
    hidden: Buffer<f32> = "[S or N, C]",
    /// Logits.
    logits: Buffer<f32> = "[S or N, V]",
}

/// Makes `buffer` hold at least `len` elements.
///
/// # Errors
/// If a device has no memory for them; the buffer is as it was then.
pub(crate) fn fit<T: Pod>(backend: &Backend, buffer: &mut Buffer<T>, len: usize) -> Result<()> {
    if buffer.len() < len {
        *buffer = backend.alloc(len).made()?;
    }
    Ok(())
}
