//! Full causal attention: the baseline that sparse attention is measured against.

use super::decode::{Placed, RowsRead, placing};
use super::{BranchGrad, Shapes};
use crate::{Backend, Element, Error, Pages, Result, Rows, Tensor, TensorMut, cuda};
use nsa_core::{NsaConfig, Packing, ShapeError};

/// Arguments of [`forward`].
#[derive(Debug)]
pub struct Forward<'a, T: Element> {
    /// Heads, dims, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// Rows `[G, Dk]`, one a token of each sequence, its context included.
    pub k: Rows<'a, T>,
    /// As many rows `[G, Dv]`.
    pub v: Rows<'a, T>,
    /// Written: `[N, Hq, Dv]`.
    pub o: TensorMut<'a, T, 3>,
    /// Written: natural log of the softmax's denominator, `[N, Hq]`.
    pub lse: TensorMut<'a, T::Acc, 2>,
}

/// Arguments of [`backward`]; every sequence starts at position 0.
#[derive(Debug)]
pub struct Backward<'a, T: Element> {
    /// Heads, dims, scale.
    pub config: &'a NsaConfig,
    /// Queries.
    pub packing: &'a Packing,
    /// `[N, Hq, Dk]`.
    pub q: Tensor<'a, T, 3>,
    /// `[N, G, Dk]`.
    pub k: Tensor<'a, T, 3>,
    /// `[N, G, Dv]`.
    pub v: Tensor<'a, T, 3>,
    /// The forward's output `[N, Hq, Dv]`.
    pub o: Tensor<'a, T, 3>,
    /// The forward's lse `[N, Hq]`.
    pub lse: Tensor<'a, T::Acc, 2>,
    /// Gradient of the output `[N, Hq, Dv]`.
    pub d_o: Tensor<'a, T, 3>,
    /// Written: `[N, Hq, Dk]` …
    pub dq: TensorMut<'a, T::Acc, 3>,
    /// … or, if true, added to what it holds.
    pub accumulate: bool,
    /// Written: `[N, G, Dk]`.
    pub dk: TensorMut<'a, T::Acc, 3>,
    /// Written: `[N, G, Dv]`.
    pub dv: TensorMut<'a, T::Acc, 3>,
}

/// Softmax attention of each query over all tokens up to its own:
/// o_t,h = Σ_s p_s v_s,g with p = softmax_s(scale · q_t,h · k_s,g), s ≤ t, g = ⌊h/R⌋.
///
/// **Shapes**: on the fields of [`Forward`].
///
/// **Numerics**: products, softmax and sums in A, p rounded to the backend's operand type before it meets v; lse
/// natural log; o rounded to `T` once. The result of a query does not depend on the number of threads nor on other
/// sequences, nor on how a sequence is cut, but for a cut that leaves a single query: its keys (on the CPU if more than 256)
/// are summed in chunks, which are then joined in their order.
///
/// **Source**: SPEC 1; reference twin `nsa_ref::dense`.
///
/// # Errors
/// If a shape does not fit.
pub fn forward<T: Element>(backend: &Backend, args: Forward<'_, T>) -> Result<()> {
    const OP: &str = "dense::forward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    let lens = |s| {
        let end = args.packing.seq(s).end();
        end..=end
    };
    shapes.forward(&args.q, ("k", &args.k), ("v", &args.v), (&args.o, &args.lse), lens)?;
    match backend {
        Backend::Cpu(cpu) => T::dense_forward(cpu, args),
        Backend::Cuda(cuda) => cuda::dense::forward(cuda, args),
    }
}

/// Gradients of [`forward`] (SPEC 3): δ = Σ do·o, p = exp(scale·q·k − lse), ds = p·(do·v − δ);
/// dq = scale·ds·k, dk = scale·Σ ds·q, dv = Σ p·do.
///
/// **Shapes**: on the fields of [`Backward`].
///
/// **Numerics**: in A, p and ds rounded to the backend's operand type; summed in an order that depends on the
/// sequence alone: the same bits on any number of threads.
///
/// **Source**: SPEC 3; reference twin `nsa_ref::dense`.
///
/// # Errors
/// If a shape does not fit or a sequence has a context.
pub fn backward<T: Element>(backend: &Backend, args: Backward<'_, T>) -> Result<()> {
    const OP: &str = "dense::backward";
    let shapes = Shapes::new(OP, args.config, args.packing);
    shapes.backward(&BranchGrad {
        rows: args.packing.num_tokens(),
        q: &args.q,
        k: ("k", &args.k),
        v: ("v", &args.v),
        o: &args.o,
        lse: &args.lse,
        d_o: &args.d_o,
        gates: None,
        d_gates: None,
        dq: &args.dq,
        dk: ("dk", &args.dk),
        dv: ("dv", &args.dv),
    })?;
    match backend {
        Backend::Cpu(cpu) => T::dense_backward(cpu, args),
        Backend::Cuda(cuda) => cuda::dense::backward(cuda, args),
    }
}

pub(crate) const OP_STEP: &str = "dense::step";

/// The caches of one sequence for one layer, the current token's key and value already in them.
#[derive(Debug)]
pub struct Cache<'a, T> {
    /// Keys of all tokens, `[context, G, Dk]`.
    pub k: Pages<'a, T>,
    /// Values of all tokens, `[context, G, Dv]`.
    pub v: Pages<'a, T>,
}

impl<T> Cache<'_, T> {
    /// Checks that the cache of sequence `s` is one, in pages of `page_rows` rows.
    fn check(&self, config: &NsaConfig, s: usize, page_rows: usize) -> Result<()> {
        let (heads, context) = (config.num_kv_heads(), self.k.len);
        let value = |value, rule| Err(Error::Value { op: OP_STEP, arg: "context", value, rule });
        if context == 0 || i32::try_from(context).is_err() {
            return value(format!("{context} of sequence {s}"), "must count the current token and fit an i32");
        }
        for (name, pages, dim) in [("k", &self.k, config.head_dim_qk()), ("v", &self.v, config.head_dim_v())] {
            let arg = format!("caches[{s}].{name}");
            pages.check(OP_STEP, &arg, [heads, dim])?;
            ShapeError::check(OP_STEP, &arg, &[context, heads, dim], &[pages.len, heads, dim])?;
            ShapeError::check(OP_STEP, &format!("page rows of {arg}"), &[page_rows], &[pages.page_rows])?;
        }
        Ok(())
    }
}

/// Where the caches of decoding steps lie, which a device is told of ([`Workspace::place`]) before they are launched
/// ([`Workspace::launch`]): launches are the same from step to step then, and can be [recorded](crate::record). It grows when a batch
/// or a context is larger than any before.
///
/// The CPU is told of caches when it computes ([`forward`]).
#[derive(Debug)]
pub struct Workspace<T> {
    layers: usize,
    device: Option<cuda::dense::step::Workspace<T>>,
}

impl<T> Workspace<T> {
    /// For the steps of so many layers, each with caches of its own.
    pub fn new(layers: usize) -> Self {
        Self { layers, device: None }
    }
}

impl<T: Element> Workspace<T> {
    /// Bytes of device memory that it holds: those of [`Needs::dense_step`](crate::cuda::workspace::Needs::dense_step), if no batch has
    /// made it grow since its first one.
    pub fn bytes(&self) -> usize {
        self.device.as_ref().map_or(0, cuda::dense::step::Workspace::bytes)
    }

    /// Notes where the caches of a layer lie, one a sequence, for [`Workspace::send`] and [`Workspace::launch`]. They must be there when
    /// the launch is done. Pages have one number of rows.
    ///
    /// # Errors
    /// On the CPU; if the workspace is for fewer layers, or a cache is none of the config's shapes, not in the device's memory, or empty.
    pub fn place(
        &mut self,
        backend: &Backend,
        config: &NsaConfig,
        layer: usize,
        caches: &[Cache<'_, T>],
    ) -> Result<Placed> {
        let cuda = placing(OP_STEP, backend, (layer, self.layers), "call `dense::forward`")?;
        let page_rows = caches.first().map_or(0, |cache| cache.k.page_rows);
        for (s, cache) in caches.iter().enumerate() {
            cache.check(config, s, page_rows)?;
        }
        let (workspace, anew) = cuda::dense::step::serving(cuda, (&mut self.device, self.layers), config, caches)?;
        workspace.place(layer, caches)?;
        Ok(Placed { rows_read: caches.iter().map(|cache| cache.k.len).collect(), anew })
    }

    /// Notes that the caches of a layer are where [`Workspace::place`] was told last, with other contexts, which costs nothing a page.
    /// None if they have to be placed: they are other ones, or more than what was placed or the workspace's memory holds.
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
        self.device.as_mut().map_or(Ok(()), cuda::dense::step::Workspace::send)
    }

    /// Attends from the last token of each sequence to its caches that the device was told of: [`forward`] of one query each, the same
    /// bits.
    ///
    /// **Shapes**: q `[S, Hq, Dk]`, o `[S, Hq, Dv]`, lse `[S, Hq]`.
    ///
    /// # Errors
    /// If no caches were placed, a shape does not fit, or the device refuses.
    pub fn launch(
        &mut self,
        layer: usize,
        q: Tensor<'_, T, 3>,
        o: TensorMut<'_, T, 3>,
        lse: TensorMut<'_, T::Acc, 2>,
    ) -> Result<()> {
        let Some(workspace) = &mut self.device else {
            let (value, rule) = ("none".to_owned(), "must be placed before the launch");
            return Err(Error::Value { op: OP_STEP, arg: "caches", value, rule });
        };
        workspace.launch(layer, q, o, lse)
    }
}
