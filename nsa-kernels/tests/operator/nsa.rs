//! The whole operator after φ.

use crate::kit::{assert_close, backend, packing, rounded, typed, values, with_threads};
use half::{bf16, f16};
use nsa_core::Element as _;
use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::nsa::{Backward, Forward, Saved, Selection, backward, forward};
use nsa_kernels::{Element, Rows, Tensor, TensorMut};
use nsa_ref::nsa as reference;
use nsa_ref::{Arithmetic, BlockIndices, Exact, Rounded};

/// A call with inputs as the reference takes them.
pub struct Call {
    pub config: NsaConfig,
    pub packing: Packing,
    pub inputs: reference::Inputs,
}

/// What the kernels wrote.
#[derive(PartialEq)]
pub struct Results<T: Element> {
    pub o: Vec<T>,
    pub branches: [Vec<T>; 3],
    pub lse: [Vec<T::Acc>; 3],
    pub block_indices: Vec<i32>,
}

/// What their backward wrote.
#[derive(PartialEq)]
struct Gradients<A> {
    dq: Vec<A>,
    d_gates: Vec<A>,
    dk: [Vec<A>; 3],
    dv: [Vec<A>; 3],
}

/// Keys and values of the branches as a kernel takes them.
struct Typed<T> {
    q: Vec<T>,
    gates: Vec<T>,
    k: [Vec<T>; 3],
    v: [Vec<T>; 3],
}

pub fn config(heads: [usize; 2], dims: [usize; 2], [l, d, p]: [usize; 3], count: usize, window: usize) -> NsaConfig {
    NsaConfig::builder(heads[0], heads[1], dims[0], dims[1])
        .compress_block(l)
        .compress_stride(d)
        .select_block(p)
        .select_count(count)
        .window(window)
        .compress_kind(CompressKind::Mean)
        .build()
        .unwrap()
}

impl Call {
    /// Random inputs of type `T` for queries behind `packing`'s contexts.
    pub fn new<T: Element>(config: NsaConfig, packing: Packing) -> Self {
        let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
        let (tokens, blocks) = (packing.cu_keys().unwrap().total(), packing.cu_blocks(&config).unwrap().total());
        let keys = |name: &str, rows| values::<T>(name, &[rows, groups, config.head_dim_qk()]);
        let vals = |name: &str, rows| values::<T>(name, &[rows, groups, config.head_dim_v()]);
        let gates = values::<T>("gates", &[n, heads, 3]).map(|x| T::from_f64(1.0 / (1.0 + (-x).exp())).to_f64());
        let inputs = reference::Inputs {
            q: values::<T>("q", &[n, heads, config.head_dim_qk()]),
            gates,
            cmp: reference::Compressed::Blocks { k: keys("k_cmp", blocks), v: vals("v_cmp", blocks) },
            k_slc: keys("k_slc", tokens),
            v_slc: vals("v_slc", tokens),
            k_win: keys("k_win", tokens),
            v_win: vals("v_win", tokens),
            block_indices: None,
        };
        Self { config, packing, inputs }
    }

    /// Keys and values of the branches.
    pub fn kv(&self) -> [[&nsa_ref::Tensor; 3]; 2] {
        let inputs = &self.inputs;
        let reference::Compressed::Blocks { k, v } = &inputs.cmp else { panic!("made from blocks") };
        [[k, &inputs.k_slc, &inputs.k_win], [v, &inputs.v_slc, &inputs.v_win]]
    }

    fn typed<T: Element>(&self) -> Typed<T> {
        let [k, v] = self.kv().map(|side| side.map(typed));
        Typed { q: typed(&self.inputs.q), gates: typed(&self.inputs.gates), k, v }
    }

    fn offsets(&self) -> [CuSeqlens; 3] {
        let keys = self.packing.cu_keys().unwrap();
        [self.packing.cu_blocks(&self.config).unwrap(), keys.clone(), keys]
    }

    /// Runs the kernel's forward, with selection unless blocks are given.
    pub fn forward<T: Element>(&self, given: Option<&[i32]>) -> Results<T> {
        let (config, typed, offsets) = (&self.config, self.typed::<T>(), self.offsets());
        let [n, heads, dim] = [self.packing.num_tokens(), config.num_heads(), config.head_dim_v()];
        let (groups, count) = (config.num_kv_heads(), config.select_count());
        let nan = || vec![T::from_f64(f64::NAN); n * heads * dim];
        let mut results = Results {
            o: nan(),
            branches: [nan(), nan(), nan()],
            lse: [(); 3].map(|()| vec![T::Acc::from_f64(f64::NAN); n * heads]),
            block_indices: given.map_or_else(|| vec![i32::MIN; n * groups * count], <[i32]>::to_vec),
        };
        let list_shape = [n, groups, count];
        let args = Forward {
            config,
            packing: &self.packing,
            q: Tensor::host(&typed.q, [n, heads, config.head_dim_qk()]).unwrap(),
            k: std::array::from_fn(|c| rows(&typed.k[c], &offsets[c], [groups, config.head_dim_qk()])),
            v: std::array::from_fn(|c| rows(&typed.v[c], &offsets[c], [groups, dim])),
            gates: Tensor::host(&typed.gates, [n, heads, 3]).unwrap(),
            selection: match given {
                Some(lists) => Selection::Given(Tensor::host(lists, list_shape).unwrap()),
                None => Selection::Compute(TensorMut::host(&mut results.block_indices, list_shape).unwrap()),
            },
            saved: Saved {
                o: results.branches.each_mut().map(|o| TensorMut::host(o, [n, heads, dim]).unwrap()),
                lse: results.lse.each_mut().map(|lse| TensorMut::host(lse, [n, heads]).unwrap()),
            },
            o: TensorMut::host(&mut results.o, [n, heads, dim]).unwrap(),
        };
        forward(&backend(), args).unwrap();
        results
    }

    fn backward<T: Element>(&self, results: &Results<T>, d_o: &nsa_ref::Tensor) -> Gradients<T::Acc> {
        let (config, typed, d_o) = (&self.config, self.typed::<T>(), typed::<T>(d_o));
        let [n, heads, dim] = [self.packing.num_tokens(), config.num_heads(), config.head_dim_v()];
        let (groups, rows) = (config.num_kv_heads(), self.offsets().map(|offsets| offsets.total()));
        let nan = |len| vec![T::Acc::from_f64(f64::NAN); len];
        let mut grads = Gradients {
            dq: nan(typed.q.len()),
            d_gates: nan(typed.gates.len()),
            dk: typed.k.each_ref().map(|k| nan(k.len())),
            dv: typed.v.each_ref().map(|v| nan(v.len())),
        };
        let key_shape = |c: usize| [rows[c], groups, config.head_dim_qk()];
        let value_shape = |c: usize| [rows[c], groups, dim];
        let ([dk0, dk1, dk2], [dv0, dv1, dv2]) = (&mut grads.dk, &mut grads.dv);
        let args = Backward {
            config,
            packing: &self.packing,
            q: Tensor::host(&typed.q, [n, heads, config.head_dim_qk()]).unwrap(),
            k: std::array::from_fn(|c| Tensor::host(&typed.k[c], key_shape(c)).unwrap()),
            v: std::array::from_fn(|c| Tensor::host(&typed.v[c], value_shape(c)).unwrap()),
            gates: Tensor::host(&typed.gates, [n, heads, 3]).unwrap(),
            block_indices: Tensor::host(&results.block_indices, [n, groups, config.select_count()]).unwrap(),
            branches: results.branches.each_ref().map(|o| Tensor::host(o, [n, heads, dim]).unwrap()),
            lse: results.lse.each_ref().map(|lse| Tensor::host(lse, [n, heads]).unwrap()),
            d_o: Tensor::host(&d_o, [n, heads, dim]).unwrap(),
            dq: TensorMut::host(&mut grads.dq, [n, heads, config.head_dim_qk()]).unwrap(),
            dk: [(dk0, 0), (dk1, 1), (dk2, 2)].map(|(d, c)| TensorMut::host(d, key_shape(c)).unwrap()),
            dv: [(dv0, 0), (dv1, 1), (dv2, 2)].map(|(d, c)| TensorMut::host(d, value_shape(c)).unwrap()),
            d_gates: TensorMut::host(&mut grads.d_gates, [n, heads, 3]).unwrap(),
        };
        backward(&backend(), args).unwrap();
        grads
    }

    /// The reference attending to given blocks.
    pub fn reference(&self, a: &impl Arithmetic, lists: &[i32]) -> reference::Outputs {
        let shape = [self.packing.num_tokens(), self.config.num_kv_heads(), self.config.select_count()];
        let mut inputs = self.inputs.clone();
        inputs.block_indices = Some(BlockIndices { shape, data: lists.to_vec() });
        reference::forward(a, &self.config, &self.packing, &inputs).unwrap()
    }

    /// Forward and backward against the reference; selection against the reference's own.
    fn check<T: Element>(&self) {
        let d_o = values::<T>("d_o", &[self.packing.num_tokens(), self.config.num_heads(), self.config.head_dim_v()]);
        let run = || {
            let results = self.forward::<T>(None);
            let grads = self.packing.starts_at_zero().then(|| self.backward(&results, &d_o));
            (results, grads)
        };
        let (results, grads) = with_threads(2, run);
        let selected = reference::forward(&Exact, &self.config, &self.packing, &self.inputs).unwrap().block_indices;
        assert_eq!(results.block_indices, selected.data);
        let rounded = rounded::<T>();
        let outputs = [self.reference(&Exact, &selected.data), self.reference(&rounded, &selected.data)];
        assert_close("o", &results.o, &outputs[0].o, &outputs[1].o);
        for c in 0..3 {
            let [truth, rounded] = outputs.each_ref().map(|o| &o.branches[c]);
            assert_close(&format!("o[{c}]"), &results.branches[c], &truth.o, &rounded.o);
            assert_close(&format!("lse[{c}]"), &results.lse[c], &truth.lse, &rounded.lse);
        }
        if let Some(grads) = &grads {
            self.check_gradients(grads, &d_o, &rounded, &outputs);
        }
        assert!((results, grads) == with_threads(1, run), "bits depend on the threads");
    }

    fn check_gradients<A: nsa_core::Element>(
        &self,
        grads: &Gradients<A>,
        d_o: &nsa_ref::Tensor,
        rounded: &Rounded,
        outputs: &[reference::Outputs; 2],
    ) {
        let (config, packing, inputs) = (&self.config, &self.packing, &self.inputs);
        let truth = reference::backward(&Exact, config, packing, inputs, &outputs[0], d_o).unwrap();
        let rounded = reference::backward(rounded, config, packing, inputs, &outputs[1], d_o).unwrap();
        assert_close("dq", &grads.dq, &truth.dq, &rounded.dq);
        assert_close("d_gates", &grads.d_gates, &truth.d_gates, &rounded.d_gates);
        let sides = |g: &reference::Gradients| {
            let g = g.clone();
            ([g.dk_blocks, g.dk_slc, g.dk_win], [g.dv_blocks, g.dv_slc, g.dv_win])
        };
        let ((truth_k, truth_v), (rounded_k, rounded_v)) = (sides(&truth), sides(&rounded));
        for c in 0..3 {
            assert_close(&format!("dk[{c}]"), &grads.dk[c], &truth_k[c], &rounded_k[c]);
            assert_close(&format!("dv[{c}]"), &grads.dv[c], &truth_v[c], &rounded_v[c]);
        }
    }
}

fn rows<'a, T>(data: &'a [T], offsets: &'a CuSeqlens, [groups, dim]: [usize; 2]) -> Rows<'a, T> {
    Rows::packed(Tensor::host(data, [offsets.total(), groups, dim]).unwrap(), offsets)
}

fn check_types(config: &NsaConfig, packing: &Packing) {
    Call::new::<f64>(config.clone(), packing.clone()).check::<f64>();
    Call::new::<f32>(config.clone(), packing.clone()).check::<f32>();
    Call::new::<bf16>(config.clone(), packing.clone()).check::<bf16>();
    Call::new::<f16>(config.clone(), packing.clone()).check::<f16>();
}

#[test]
fn ragged_sequences_in_every_type() {
    check_types(&config([6, 3], [10, 14], [8, 4, 16], 4, 32), &packing(&[0, 5, 37, 0, 64, 1, 90, 0]));
    check_types(&config([7, 1], [24, 8], [6, 3, 9], 3, 7), &packing(&[111]));
    check_types(&config([3, 3], [5, 3], [16, 4, 16], 9, 300), &packing(&[7, 90]));
}

#[test]
fn no_token_at_all() {
    for lengths in [&[][..], &[0, 0]] {
        check_types(&config([4, 2], [8, 8], [8, 4, 16], 4, 32), &packing(lengths));
    }
}

#[test]
fn chunks_behind_contexts() {
    let offsets = CuSeqlens::from_lengths([3, 0, 20, 1]).unwrap();
    let packing = Packing::with_contexts(offsets, vec![0, 12, 61, 99]).unwrap();
    check_types(&config([4, 2], [12, 10], [8, 4, 16], 4, 32), &packing);
}

#[test]
fn given_blocks_are_attended_to() {
    let call = Call::new::<f32>(config([4, 2], [8, 8], [8, 4, 16], 4, 16), packing(&[70]));
    // Block 0 alone, whatever the scores are.
    let lists: Vec<i32> = (0..70 * 2).flat_map(|_| [0, -1, -1, -1]).collect();
    let results = call.forward::<f32>(Some(&lists));
    let truth = call.reference(&Exact, &lists);
    assert_close("o", &results.o, &truth.o, &call.reference(&rounded::<f32>(), &lists).o);
    assert_eq!(results.block_indices, lists);
}
