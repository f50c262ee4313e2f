//! φ.

use crate::kit::{assert_close, backend, packing, rounded, scaled, typed, values, with_threads};
use half::{bf16, f16};
use nsa_core::Element as _;
use nsa_core::{CompressKind, NsaConfig, Packing, index};
use nsa_kernels::op::compress::{Backward, Forward, Phi, PhiGrad, backward, forward};
use nsa_kernels::{Element, Error, Tensor, TensorMut};
use nsa_ref::Exact;
use nsa_ref::compress as reference;

const HEADS: usize = 3;
const DIM: usize = 5;
const HIDDEN: usize = 7;
/// What gradients that are added to hold before.
const BEFORE: f64 = 0.5;

fn config(kind: CompressKind, sizes: [usize; 2]) -> NsaConfig {
    config_of(HEADS, kind, sizes)
}

fn config_of(heads: usize, kind: CompressKind, [l, d]: [usize; 2]) -> NsaConfig {
    let builder = NsaConfig::builder(2 * heads, heads, 8, DIM).compress_block(l).compress_stride(d).select_block(2 * l);
    builder.compress_kind(kind).compress_hidden(HIDDEN).build().unwrap()
}

/// Weights as the kernel takes them.
enum Weights<T> {
    Mean,
    Weighted(Vec<T>),
    Linear(Vec<T>),
    Mlp([Vec<T>; 2], [Option<Vec<T>>; 2]),
}

struct Case {
    config: NsaConfig,
    packing: Packing,
    dim: usize,
    x: nsa_ref::Tensor,
    position: Option<nsa_ref::Tensor>,
    phi: reference::Phi,
    d_blocks: nsa_ref::Tensor,
}

/// What a kernel wrote.
#[derive(PartialEq)]
struct Results<T: Element> {
    blocks: Vec<T>,
    dx: Vec<T::Acc>,
    d_position: Vec<T::Acc>,
    /// In the order of the fields of φ.
    d_phi: Vec<Vec<T::Acc>>,
}

impl Case {
    /// Random inputs of type `T`; `extras`: position embedding, first bias, second bias. Tokens that belong to no
    /// block are NaN.
    fn new<T: Element>(config: NsaConfig, lengths: &[usize], dim: usize, extras: [bool; 3]) -> Self {
        let heads = config.num_kv_heads();
        let (packing, l, kind) = (packing(lengths), config.compress_block(), config.compress_kind());
        let blocks = packing.cu_blocks(&config).unwrap().total();
        let mut x = values::<T>("x", &[packing.num_tokens(), heads, dim]);
        for seq in packing.seqs() {
            let covered = match index::num_blocks(&config, seq.rows.len()) {
                0 => 0,
                m => index::block_tokens(&config, m - 1).end,
            };
            x.data[(seq.rows.start + covered) * heads * dim..seq.rows.end * heads * dim].fill(f64::NAN);
        }
        let weight = |name: &str, shape: &[usize], inputs: usize| {
            scaled::<T>(1.5 / (inputs as f64).sqrt(), &values::<T>(name, shape))
        };
        let phi = match kind {
            CompressKind::Mean => reference::Phi::Mean,
            CompressKind::Weighted => reference::Phi::Weighted { weight: weight("a", &[l, heads], l) },
            CompressKind::Linear => reference::Phi::Linear { weight: weight("w", &[heads, l * dim, dim], l * dim) },
            CompressKind::Mlp => reference::Phi::Mlp {
                weight1: weight("w1", &[heads, l * dim, HIDDEN], l * dim),
                bias1: extras[1].then(|| values::<T>("b1", &[heads, HIDDEN])),
                weight2: weight("w2", &[heads, HIDDEN, dim], HIDDEN),
                bias2: extras[2].then(|| values::<T>("b2", &[heads, dim])),
            },
        };
        let position = extras[0].then(|| values::<T>("e", &[l, heads, dim]));
        let d_blocks = values::<T::Acc>("d_blocks", &[blocks, heads, dim]);
        Self { config, packing, dim, x, position, phi, d_blocks }
    }

    fn weights<T: Element>(&self) -> Weights<T> {
        match &self.phi {
            reference::Phi::Mean => Weights::Mean,
            reference::Phi::Weighted { weight } => Weights::Weighted(typed(weight)),
            reference::Phi::Linear { weight } => Weights::Linear(typed(weight)),
            reference::Phi::Mlp { weight1, bias1, weight2, bias2 } => {
                Weights::Mlp([typed(weight1), typed(weight2)], [bias1.as_ref().map(typed), bias2.as_ref().map(typed)])
            }
        }
    }

    fn phi<'a, T: Element>(&self, weights: &'a Weights<T>) -> Phi<'a, T> {
        let rows = self.config.compress_block() * self.dim;
        match weights {
            Weights::Mean => Phi::Mean,
            Weights::Weighted(a) => Phi::Weighted {
                weight: Tensor::host(a, [a.len() / self.config.num_kv_heads(), self.config.num_kv_heads()]).unwrap(),
            },
            Weights::Linear(w) => {
                Phi::Linear { weight: Tensor::host(w, [self.config.num_kv_heads(), rows, self.dim]).unwrap() }
            }
            Weights::Mlp([w1, w2], [b1, b2]) => Phi::Mlp {
                weight1: Tensor::host(w1, [self.config.num_kv_heads(), rows, HIDDEN]).unwrap(),
                bias1: b1.as_ref().map(|b| Tensor::host(b, [self.config.num_kv_heads(), HIDDEN]).unwrap()),
                weight2: Tensor::host(w2, [self.config.num_kv_heads(), HIDDEN, self.dim]).unwrap(),
                bias2: b2.as_ref().map(|b| Tensor::host(b, [self.config.num_kv_heads(), self.dim]).unwrap()),
            },
        }
    }

    fn phi_grad<'a, A: nsa_core::Element>(&self, grads: &'a mut [Vec<A>]) -> PhiGrad<'a, A> {
        let rows = self.config.compress_block() * self.dim;
        let mut grads = grads.iter_mut();
        let mut next = || grads.next().unwrap();
        match &self.phi {
            reference::Phi::Mean => PhiGrad::Mean,
            reference::Phi::Weighted { weight } => PhiGrad::Weighted {
                weight: TensorMut::host(next(), [weight.shape[0], self.config.num_kv_heads()]).unwrap(),
            },
            reference::Phi::Linear { .. } => PhiGrad::Linear {
                weight: TensorMut::host(next(), [self.config.num_kv_heads(), rows, self.dim]).unwrap(),
            },
            reference::Phi::Mlp { bias1, bias2, .. } => PhiGrad::Mlp {
                weight1: TensorMut::host(next(), [self.config.num_kv_heads(), rows, HIDDEN]).unwrap(),
                bias1: bias1.as_ref().map(|_| TensorMut::host(next(), [self.config.num_kv_heads(), HIDDEN]).unwrap()),
                weight2: TensorMut::host(next(), [self.config.num_kv_heads(), HIDDEN, self.dim]).unwrap(),
                bias2: bias2.as_ref().map(|_| TensorMut::host(next(), [self.config.num_kv_heads(), self.dim]).unwrap()),
            },
        }
    }

    fn run<T: Element>(&self) -> Results<T> {
        let backend = backend();
        let nan = |len| vec![T::Acc::from_f64(f64::NAN); len];
        let before = |t: &nsa_ref::Tensor| vec![T::Acc::from_f64(BEFORE); t.data.len()];
        let (x, d_blocks) = (typed::<T>(&self.x), typed::<T::Acc>(&self.d_blocks));
        let (position, weights) = (self.position.as_ref().map(typed::<T>), self.weights::<T>());
        let x_shape = [self.packing.num_tokens(), self.config.num_kv_heads(), self.dim];
        let blocks_shape = [self.d_blocks.shape[0], self.config.num_kv_heads(), self.dim];
        let position_shape = [self.config.compress_block(), self.config.num_kv_heads(), self.dim];
        let position = || position.as_ref().map(|e| Tensor::host(e, position_shape).unwrap());
        let mut results = Results::<T> {
            blocks: vec![T::from_f64(f64::NAN); d_blocks.len()],
            dx: nan(x.len()),
            d_position: self.position.iter().flat_map(before).collect(),
            d_phi: parts(&self.phi).into_iter().map(before).collect(),
        };
        let args = Forward {
            config: &self.config,
            packing: &self.packing,
            x: Tensor::host(&x, x_shape).unwrap(),
            position: position(),
            phi: self.phi(&weights),
            blocks: TensorMut::host(&mut results.blocks, blocks_shape).unwrap(),
        };
        forward(&backend, args).unwrap();
        let d_position = &mut results.d_position;
        let args = Backward {
            config: &self.config,
            packing: &self.packing,
            x: Tensor::host(&x, x_shape).unwrap(),
            position: position(),
            phi: self.phi(&weights),
            d_blocks: Tensor::host(&d_blocks, blocks_shape).unwrap(),
            dx: TensorMut::host(&mut results.dx, x_shape).unwrap(),
            d_position: self.position.as_ref().map(|_| TensorMut::host(d_position, position_shape).unwrap()),
            d_phi: self.phi_grad(&mut results.d_phi),
        };
        backward(&backend, args).unwrap();
        results
    }

    fn check<T: Element>(&self) {
        let results = with_threads(2, || self.run::<T>());
        let (exact, rounded) = (self.reference(&Exact), self.reference(&rounded::<T>()));
        assert_close("blocks", &results.blocks, &exact.0, &rounded.0);
        assert_close("dx", &results.dx, &exact.1.dx, &rounded.1.dx);
        let added = |t: &nsa_ref::Tensor| t.map(|x| x + BEFORE);
        if let (Some(truth), Some(rounded)) = (&exact.1.d_position, &rounded.1.d_position) {
            assert_close("d_position", &results.d_position, &added(truth), &added(rounded));
        }
        for (i, (truth, rounded)) in parts(&exact.1.d_phi).into_iter().zip(parts(&rounded.1.d_phi)).enumerate() {
            assert_close(&format!("d_phi[{i}]"), &results.d_phi[i], &added(truth), &added(rounded));
        }
        assert!(results == with_threads(1, || self.run::<T>()), "bits depend on the threads");
    }

    fn reference<A: nsa_ref::Arithmetic>(&self, a: &A) -> (nsa_ref::Tensor, reference::Gradients) {
        let (config, packing, position) = (&self.config, &self.packing, self.position.as_ref());
        let blocks = reference::forward(a, config, packing, &self.x, position, &self.phi).unwrap();
        let grads = reference::backward(a, config, packing, &self.x, position, &self.phi, &self.d_blocks).unwrap();
        (blocks, grads)
    }
}

/// The tensors of φ's weights that are there.
fn parts(phi: &reference::Phi) -> Vec<&nsa_ref::Tensor> {
    match phi {
        reference::Phi::Mean => vec![],
        reference::Phi::Weighted { weight } | reference::Phi::Linear { weight } => vec![weight],
        reference::Phi::Mlp { weight1, bias1, weight2, bias2 } => {
            [Some(weight1), bias1.as_ref(), Some(weight2), bias2.as_ref()].into_iter().flatten().collect()
        }
    }
}

const KINDS: [CompressKind; 4] = [CompressKind::Mean, CompressKind::Weighted, CompressKind::Linear, CompressKind::Mlp];

#[test]
fn every_kind_and_type_on_ragged_sequences() {
    for kind in KINDS {
        for sizes in [[8, 8], [8, 4], [8, 2], [6, 3], [1, 1]] {
            let config = config(kind, sizes);
            for position in [false, true] {
                let (lengths, extras) = ([0, 5, 37, 0, 64, 1, 90, 0], [position, true, true]);
                Case::new::<f64>(config.clone(), &lengths, DIM, extras).check::<f64>();
                Case::new::<f32>(config.clone(), &lengths, DIM, extras).check::<f32>();
                Case::new::<bf16>(config.clone(), &lengths, DIM, extras).check::<bf16>();
                Case::new::<f16>(config.clone(), &lengths, DIM, extras).check::<f16>();
            }
        }
    }
}

#[test]
fn every_combination_of_biases() {
    for (bias1, bias2) in [(false, false), (false, true), (true, false)] {
        for position in [false, true] {
            let config = config(CompressKind::Mlp, [8, 4]);
            Case::new::<f64>(config.clone(), &[41], DIM, [position, bias1, bias2]).check::<f64>();
            Case::new::<f32>(config, &[41], DIM, [position, bias1, bias2]).check::<f32>();
        }
    }
}

#[test]
fn sequences_of_many_pieces() {
    for kind in KINDS {
        Case::new::<f64>(config(kind, [4, 1]), &[600, 270], DIM, [true; 3]).check::<f64>();
        Case::new::<f32>(config(kind, [4, 1]), &[600, 270], DIM, [true; 3]).check::<f32>();
    }
}

/// One head's tokens are used where they lie.
#[test]
fn a_single_head() {
    for kind in KINDS {
        Case::new::<f32>(config_of(1, kind, [8, 4]), &[33, 50], DIM, [true; 3]).check::<f32>();
        Case::new::<bf16>(config_of(1, kind, [8, 4]), &[33, 50], DIM, [true; 3]).check::<bf16>();
    }
}

#[test]
fn no_block_at_all() {
    for kind in KINDS {
        for lengths in [&[][..], &[0], &[7, 0, 3]] {
            let case = Case::new::<f32>(config(kind, [8, 4]), lengths, DIM, [true; 3]);
            let results = case.run::<f32>();
            assert!(results.blocks.is_empty() && results.dx.iter().all(|&x| x == 0.0), "{kind:?} {lengths:?}");
            assert!(results.d_phi.iter().flatten().all(|&x| x == BEFORE as f32), "{kind:?} {lengths:?}");
        }
    }
}

/// A sequence's blocks and gradients do not depend on what else is in the call.
#[test]
fn other_sequences_change_no_bit() {
    for kind in KINDS {
        let whole = Case::new::<f32>(config(kind, [8, 4]), &[50, 33], DIM, [true; 3]);
        let mut alone = Case::new::<f32>(config(kind, [8, 4]), &[33], DIM, [true; 3]);
        let (first, token) = (whole.packing.cu_blocks(&whole.config).unwrap().range(0).len(), HEADS * DIM);
        alone.x.data.copy_from_slice(&whole.x.data[50 * token..]);
        alone.d_blocks.data.copy_from_slice(&whole.d_blocks.data[first * token..]);
        let (whole, alone) = (whole.run::<f32>(), alone.run::<f32>());
        assert_eq!(whole.blocks[first * token..], alone.blocks);
        // The last token belongs to no block.
        assert_eq!(whole.dx[50 * token..], alone.dx);
    }
}

#[test]
fn arguments_that_do_not_fit_are_named() {
    let backend = backend();
    let (config, packing) = (config(CompressKind::Weighted, [8, 4]), packing(&[20]));
    let (x, a) = (vec![0.0f32; 20 * HEADS * DIM], vec![0.0f32; 8 * HEADS]);
    let mut blocks = vec![0.0f32; 4 * HEADS * DIM];
    let mut call = |packing: &Packing, phi: Phi<'_, f32>, rows: usize| {
        let blocks = TensorMut::host(&mut blocks, [rows, HEADS, DIM]).unwrap();
        let x = Tensor::host(&x, [20, HEADS, DIM]).unwrap();
        forward(&backend, Forward { config: &config, packing, x, position: None, phi, blocks })
    };
    let weighted = |shape| Phi::Weighted { weight: Tensor::host(&a, shape).unwrap() };
    assert_eq!(call(&packing, weighted([8, HEADS]), 4), Ok(()));
    let message = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert!(message(call(&packing, Phi::Mean, 4)).contains("`phi` = Mean"));
    let wrong = message(call(&packing, weighted([7, HEADS]), 4));
    assert!(wrong.contains("`phi.weight` has shape [7, 3], expected [8, 3]"), "{wrong}");
    assert!(
        message(call(&packing, weighted([8, HEADS]), 3)).contains("`blocks` has shape [3, 3, 5], expected [4, 3, 5]")
    );
    let late = Packing::with_contexts(packing.cu_seqlens().clone(), vec![9]).unwrap();
    assert!(message(call(&late, weighted([8, HEADS]), 4)).contains("a context of 9"));
}

#[test]
fn a_gradient_without_its_weight_is_named() {
    let backend = backend();
    let (config, packing) = (config(CompressKind::Mean, [8, 4]), packing(&[20]));
    let (x, d_blocks) = (vec![0.0f32; 20 * HEADS * DIM], vec![0.0f32; 4 * HEADS * DIM]);
    let (mut dx, mut e) = (x.clone(), vec![0.0f32; 8 * HEADS * DIM]);
    let args = Backward {
        config: &config,
        packing: &packing,
        x: Tensor::host(&x, [20, HEADS, DIM]).unwrap(),
        position: None,
        phi: Phi::Mean,
        d_blocks: Tensor::host(&d_blocks, [4, HEADS, DIM]).unwrap(),
        dx: TensorMut::host(&mut dx, [20, HEADS, DIM]).unwrap(),
        d_position: Some(TensorMut::host(&mut e, [8, HEADS, DIM]).unwrap()),
        d_phi: PhiGrad::Mean,
    };
    assert!(backward(&backend, args).unwrap_err().to_string().contains("`d_position` = present"));
}
