//! Memory of one forward pass, kept from pass to pass.

use nsa_kernels::op::decode;
use nsa_kernels::{Backend, Buffer};

macro_rules! workspace {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $len:literal),* $(,)?) => {
        /// Buffers of one forward pass over N tokens of S sequences. They only grow, and what they hold between passes
        /// means nothing.
        #[derive(Debug)]
        pub(crate) struct Workspace {
            $($(#[$doc])* #[doc = concat!(" `", $len, "`.")] pub(crate) $name: $type,)*
            /// What the steps of all layers leave for the next ones.
            pub(crate) decode: decode::Workspace<f32>,
        }

        impl Workspace {
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
    x: Buffer<f32> = "[N, C]",
    /// Its norm, input of both halves of a layer.
    h: Buffer<f32> = "[N, C]",
    /// Queries before their norm.
    raw_q: Buffer<f32> = "[N, Hq, Dk]",
    /// Keys of slc, or of full attention, before their norm.
    raw_k_slc: Buffer<f32> = "[N, G, Dk]",
    /// Keys of win before their norm.
    raw_k_win: Buffer<f32> = "[N, G, Dk]",
    /// Queries.
    q: Buffer<f32> = "[N, Hq, Dk]",
    /// Keys of cmp, before φ.
    k_cmp: Buffer<f32> = "[N, G, Dk]",
    /// Keys of slc, or of full attention.
    k_slc: Buffer<f32> = "[N, G, Dk]",
    /// Keys of win.
    k_win: Buffer<f32> = "[N, G, Dk]",
    /// Values of cmp, before φ.
    v_cmp: Buffer<f32> = "[N, G, Dv]",
    /// Values of slc, or of full attention.
    v_slc: Buffer<f32> = "[N, G, Dv]",
    /// Values of win.
    v_win: Buffer<f32> = "[N, G, Dv]",
    /// Gates before the sigmoid.
    gate_logits: Buffer<f32> = "[N, 3·Hq]",
    /// Gates.
    gates: Buffer<f32> = "[N, Hq, 3]",
    /// Output of cmp.
    o_cmp: Buffer<f32> = "[N, Hq, Dv]",
    /// Output of slc.
    o_slc: Buffer<f32> = "[N, Hq, Dv]",
    /// Output of win.
    o_win: Buffer<f32> = "[N, Hq, Dv]",
    /// Log-sum-exp of cmp.
    lse_cmp: Buffer<f32> = "[N, Hq]",
    /// Log-sum-exp of slc, or of full attention.
    lse_slc: Buffer<f32> = "[N, Hq]",
    /// Log-sum-exp of win.
    lse_win: Buffer<f32> = "[N, Hq]",
    /// Selected blocks.
    indices: Buffer<i32> = "[N, G, n]",
    /// Attention's output.
    o: Buffer<f32> = "[N, Hq, Dv]",
    /// The MLP's gate.
    mlp_gate: Buffer<f32> = "[N, F]",
    /// The MLP's other half.
    mlp_up: Buffer<f32> = "[N, F]",
    /// Their product.
    mlp: Buffer<f32> = "[N, F]",
    /// Raw keys of the blocks that this pass completes, ring and new ones.
    tail_k: Buffer<f32> = "[.., G, Dk]",
    /// Raw values of the same.
    tail_v: Buffer<f32> = "[.., G, Dv]",
    /// New compressed keys before their norm.
    raw_blocks: Buffer<f32> = "[.., G, Dk]",
    /// New compressed keys.
    k_blocks: Buffer<f32> = "[.., G, Dk]",
    /// New compressed values.
    v_blocks: Buffer<f32> = "[.., G, Dv]",
    /// Positions of the new compressed keys.
    block_positions: Buffer<i32> = "[..]",
    /// Keys of win that the queries of this pass reach.
    reach_k: Buffer<f32> = "[.., G, Dk]",
    /// Values of win that they reach.
    reach_v: Buffer<f32> = "[.., G, Dv]",
    /// Rows of the residual stream that logits are wanted of.
    last: Buffer<f32> = "[S or N, C]",
    /// Their norm.
    last_norm: Buffer<f32> = "[S or N, C]",
    /// Logits.
    logits: Buffer<f32> = "[S or N, V]",
}

/// Makes `buffer` hold at least `len` elements.
pub(crate) fn fit<T: bytemuck::Pod>(backend: &Backend, buffer: &mut Buffer<T>, len: usize) {
    if buffer.len() < len {
        *buffer = backend.alloc(len);
    }
}
