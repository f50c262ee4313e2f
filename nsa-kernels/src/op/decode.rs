//! One decoding step for a batch of sequences, from their caches (SPEC 4).

use crate::cuda::{self, Cuda};
use crate::{Backend, Element, Error, Pages, Result, Tensor, TensorMut};
use nsa_core::{NsaConfig, ShapeError, index};

/// The caches of one sequence for one layer, the current token's keys and values already in them.
#[derive(Debug)]
pub struct Cache<'a, T> {
    /// Tokens so far, the current one included.
    pub context: usize,
    /// k̃ of all complete blocks, `[M, G, Dk]`.
    pub k_cmp: Pages<'a, T>,
    /// ṽ of all complete blocks, `[M, G, Dv]`.
    pub v_cmp: Pages<'a, T>,
    /// k^slc of all tokens, `[context, G, Dk]`.
    pub k_slc: Pages<'a, T>,
    /// v^slc of all tokens, `[context, G, Dv]`.
    pub v_slc: Pages<'a, T>,
    /// Ring of k^win `[w, G, Dk]`: position s lies in row s mod w. Rows that no token has come to may be missing.
    pub k_win: Tensor<'a, T, 3>,
    /// Ring of v^win `[w, G, Dv]`.
    pub v_win: Tensor<'a, T, 3>,
}

/// Arguments of [`step`].
#[derive(Debug)]
pub struct Step<'a, T: Element> {
    /// Everything.
    pub config: &'a NsaConfig,
    /// One a sequence.
    pub caches: &'a [Cache<'a, T>],
    /// The current tokens' queries `[S, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// After the sigmoid, `[S, Hq, 3]`.
    pub gates: Tensor<'a, T, 3>,
    /// Written: `[S, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: selected blocks `[S, G, n]`, ascending, padded with −1.
    pub block_indices: TensorMut<'a, i32, 3>,
}

/// What steps leave for the next ones of their layer and of others: on a device, memory for a step and tables of where the
/// caches lie, so that a step allocates nothing. It grows when a batch or a context is larger than any before.
///
/// On a device a step can be told where its caches lie ([`Workspace::place`]) before it is launched ([`Workspace::launch`]), so that
/// launches are the same from step to step and can be [recorded](crate::record).
#[derive(Debug)]
pub struct Workspace<T> {
    layers: usize,
    device: Option<cuda::decode::Workspace<T>>,
}

/// What [`Workspace::place`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Token-rows of K and V that the step will read, one entry a sequence.
    pub rows_read: RowsRead,
    /// Whether the workspace has other memory than before: launches that were recorded are void, and the places of other layers'
    /// caches are forgotten.
    pub anew: bool,
}

impl<T> Workspace<T> {
    /// For the steps of so many layers, each with caches of its own.
    pub fn new(layers: usize) -> Self {
        Self { layers, device: None }
    }
}

impl<T: Element> Workspace<T> {
    /// Notes where the caches of a layer lie, for [`Workspace::send`] and [`Workspace::launch`]. The caches must be there when the
    /// launch is done.
    ///
    /// # Errors
    /// On the CPU, which is told of them when it computes ([`step_with`]); if the workspace is for fewer layers, or a cache does not
    /// hold the rows that its context asks for.
    pub fn place(
        &mut self,
        backend: &Backend,
        config: &NsaConfig,
        layer: usize,
        caches: &[Cache<'_, T>],
    ) -> Result<Placed> {
        let cuda = placing(OP, backend, (layer, self.layers), "call `step_with`")?;
        let (workspace, anew) = cuda::decode::serving(cuda, (&mut self.device, self.layers), config, caches)?;
        Ok(Placed { rows_read: workspace.place(layer, caches)?, anew })
    }

    /// Notes that the caches of a layer are where [`Workspace::place`] was told last, one row longer or more, which costs nothing a page:
    /// `contexts` has the new context of each. None if they have to be placed: they are other ones, or more than what was placed or the
    /// workspace's memory holds.
    ///
    /// # Errors
    /// If there is no such layer.
    pub fn place_again(&mut self, layer: usize, contexts: &[usize]) -> Result<Option<RowsRead>> {
        self.device.as_mut().map_or(Ok(None), |workspace| workspace.place_again(layer, contexts))
    }

    /// Tells the device what was noted since it was told before: one or two copies for all layers, in the order of its work.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn send(&mut self) -> Result<()> {
        self.device.as_mut().map_or(Ok(()), cuda::decode::Workspace::send)
    }

    /// Launches the step of a layer on the caches that the device was told of. Shapes and numerics as of [`step`].
    ///
    /// # Errors
    /// If no caches were placed, a shape does not fit, or the device refuses.
    pub fn launch(
        &mut self,
        layer: usize,
        q: Tensor<'_, T, 3>,
        gates: Tensor<'_, T, 3>,
        o: TensorMut<'_, T, 3>,
        block_indices: TensorMut<'_, i32, 3>,
    ) -> Result<()> {
        let Some(workspace) = &mut self.device else {
            let (value, rule) = ("none".to_owned(), "must be placed before the launch");
            return Err(Error::Value { op: OP, arg: "caches", value, rule });
        };
        workspace.launch(layer, q, gates, o, block_indices)
    }
}

/// The device on which the caches of layer `layer` of `layers` can be placed.
///
/// # Errors
/// On the CPU, with what to do there; if there is no such layer.
pub(super) fn placing<'b>(
    op: &'static str,
    backend: &'b Backend,
    (layer, layers): (usize, usize),
    advice: &'static str,
) -> Result<&'b Cuda> {
    let Backend::Cuda(cuda) = backend else {
        let (backend, what) = (backend.name(), "steps whose caches are placed before".to_owned());
        return Err(Error::Unsupported { op, backend, what, advice });
    };
    ShapeError::check(op, "layers", &[layers.max(layer + 1)], &[layers])?;
    Ok(cuda)
}

/// Token-rows of K and V that a step read, one entry a sequence.
pub type RowsRead = Vec<usize>;

/// Attends from the last token of each sequence to its caches: compressed branch with selection, selected branch,
/// window and gate in one pass, o_h = Σ_c g^c_h · o^c_h.
///
/// Returns the token-rows of K and V read for each sequence (those of the group that reads most), at most
/// [`index::decode_rows`].
///
/// **Shapes**: on the fields of [`Step`] and [`Cache`].
///
/// **Numerics**: those of [`nsa::forward`](super::nsa::forward), summed over chunks of keys that are then joined in their
/// order. Independent of the number of threads and of the other sequences.
///
/// **Source**: SPEC 4; reference twin `nsa_ref::decode`.
///
/// # Errors
/// If a shape does not fit, or a cache does not hold the rows that its context asks for.
pub fn step<T: Element>(backend: &Backend, args: Step<'_, T>) -> Result<RowsRead> {
    step_with(backend, &mut Workspace::new(1), 0, args)
}

/// [`step`] of layer `layer` with what the steps before left.
///
/// # Errors
/// Those of [`step`], or if the workspace is for fewer layers.
pub fn step_with<T: Element>(
    backend: &Backend,
    workspace: &mut Workspace<T>,
    layer: usize,
    args: Step<'_, T>,
) -> Result<RowsRead> {
    let config = args.config;
    let (seqs, heads) = (args.caches.len(), config.num_heads());
    args.q.check(OP, "q", [seqs, heads, config.head_dim_qk()])?;
    args.gates.check(OP, "gates", [seqs, heads, 3])?;
    args.o.check(OP, "o", [seqs, heads, config.head_dim_v()])?;
    args.block_indices.check(OP, "block_indices", [seqs, config.num_kv_heads(), config.select_count()])?;
    for (s, cache) in args.caches.iter().enumerate() {
        cache.check(config, s)?;
    }
    ShapeError::check(OP, "layers", &[workspace.layers.max(layer + 1)], &[workspace.layers])?;
    match backend {
        Backend::Cpu(cpu) => T::decode_step(cpu, args),
        Backend::Cuda(cuda) => {
            let Workspace { layers, device } = workspace;
            cuda::decode::step(cuda, (device, *layers), layer, args)
        }
    }
}

pub(crate) const OP: &str = "decode::step";

impl<T> Cache<'_, T> {
    /// Checks that the cache of sequence `s` holds what its context asks for.
    pub(crate) fn check(&self, config: &NsaConfig, s: usize) -> Result<()> {
        if self.context == 0 || i32::try_from(self.context).is_err() {
            return Err(Error::Value {
                op: OP,
                arg: "context",
                value: format!("{} of sequence {s}", self.context),
                rule: "must count the current token and fit an i32",
            });
        }
        let (heads, blocks) = (config.num_kv_heads(), index::num_blocks(config, self.context));
        let (keys, values) = ([heads, config.head_dim_qk()], [heads, config.head_dim_v()]);
        for (name, pages, row_shape, rows) in [
            ("k_cmp", &self.k_cmp, keys, blocks),
            ("v_cmp", &self.v_cmp, values, blocks),
            ("k_slc", &self.k_slc, keys, self.context),
            ("v_slc", &self.v_slc, values, self.context),
        ] {
            let arg = format!("caches[{s}].{name}");
            pages.check(OP, &arg, row_shape)?;
            ShapeError::check(OP, &arg, &[rows, row_shape[0], row_shape[1]], &[pages.len, row_shape[0], row_shape[1]])?;
        }
        for (name, ring, [heads, dim]) in [("k_win", &self.k_win, keys), ("v_win", &self.v_win, values)] {
            let rows = ring.shape()[0].max(config.window().min(self.context));
            ring.check(OP, &format!("caches[{s}].{name}"), [rows, heads, dim])?;
        }
        Ok(())
    }
}
