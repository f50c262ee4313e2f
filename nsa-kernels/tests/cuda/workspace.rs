//! The whole operator in a workspace of the caller's, and recorded.

use super::pages::numbers;
use half::bf16;
use nsa_core::{CompressKind, CuSeqlens, DType, NsaConfig, Packing};
use nsa_kernels::cuda::workspace::{PhiParts, Workspace};
use nsa_kernels::cuda::{Cuda, Device};
use nsa_kernels::op::compress::{Phi, PhiGrad};
use nsa_kernels::op::{compress, dense, nsa};
use nsa_kernels::{Backend, Buffer, Result, Rows, Tensor, TensorMut};
use nsa_tests::sim::on_an_a100;

/// Keys of the branches cmp, slc, win, or values; then the weight of φ.
struct Side {
    dim: usize,
    rows: [Buffer<bf16>; 3],
    weight: Buffer<bf16>,
    blocks: Buffer<bf16>,
}

/// Gradients of a side.
struct Gradients {
    rows: [Buffer<f32>; 3],
    blocks: Buffer<f32>,
    weight: Buffer<f32>,
}

/// Everything that the operator reads and writes.
struct Operator {
    backend: Backend,
    config: NsaConfig,
    packing: Packing,
    q: Buffer<bf16>,
    gates: Buffer<bf16>,
    d_o: Buffer<bf16>,
    sides: [Side; 2],
    gradients: [Gradients; 2],
    block_indices: Buffer<i32>,
    branches: [Buffer<bf16>; 3],
    lse: [Buffer<f32>; 3],
    o: Buffer<bf16>,
    dq: Buffer<f32>,
    d_gates: Buffer<f32>,
}

impl Operator {
    fn new(backend: &Backend, lengths: &[usize]) -> Self {
        let builder = NsaConfig::builder(8, 2, 40, 24).compress_kind(CompressKind::Weighted);
        let builder = builder.compress_block(8).compress_stride(4).select_block(16).select_count(4).window(33);
        let config = builder.build().expect("valid");
        let packing = Packing::new(CuSeqlens::from_lengths(lengths.iter().copied()).expect("short"));
        let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
        let blocks = packing.cu_blocks(&config).expect("short").total();
        let upload = |count, step| backend.upload(&numbers::<bf16>(count, step));
        let side = |dim: usize, step: usize| Side {
            dim,
            rows: [0, 1, 2].map(|branch| upload(n * groups * dim, step + 12 * branch)),
            weight: upload(config.compress_block() * groups, step + 2),
            blocks: backend.alloc(blocks * groups * dim),
        };
        let gradients = |dim: usize| Gradients {
            rows: [0, 1, 2].map(|_| backend.alloc(n * groups * dim)),
            blocks: backend.alloc(blocks * groups * dim),
            weight: backend.alloc(config.compress_block() * groups),
        };
        let (dim_k, dim_v) = (config.head_dim_qk(), config.head_dim_v());
        Self {
            q: upload(n * heads * dim_k, 31),
            gates: upload(n * heads * 3, 7),
            d_o: upload(n * heads * dim_v, 43),
            sides: [side(dim_k, 17), side(dim_v, 23)],
            gradients: [gradients(dim_k), gradients(dim_v)],
            block_indices: backend.alloc(n * groups * config.select_count()),
            branches: [0, 1, 2].map(|_| backend.alloc(n * heads * dim_v)),
            lse: [0, 1, 2].map(|_| backend.alloc(n * heads)),
            o: backend.alloc(n * heads * dim_v),
            dq: backend.alloc(n * heads * dim_k),
            d_gates: backend.alloc(n * heads * 3),
            backend: backend.clone(),
            config,
            packing,
        }
    }

    /// φ, the operator, its gradients, those of φ.
    fn run(&mut self) -> Result<()> {
        let Self { backend, config, packing, sides, .. } = self;
        let (n, groups, weights) =
            (packing.num_tokens(), config.num_kv_heads(), [config.compress_block(), config.num_kv_heads()]);
        let count = packing.cu_blocks(config)?.total();
        for side in sides {
            let (x, phi) =
                (side.rows[0].tensor([n, groups, side.dim])?, Phi::Weighted { weight: side.weight.tensor(weights)? });
            let blocks = side.blocks.tensor_mut([count, groups, side.dim])?;
            compress::forward(backend, compress::Forward { config, packing, x, position: None, phi, blocks })?;
        }
        self.forward()?;
        self.backward()?;
        let Self { backend, config, packing, sides, gradients, .. } = self;
        for (side, gradients) in sides.iter().zip(gradients) {
            gradients.weight.tensor_mut(weights)?.fill(0.0)?;
            let shape = [n, groups, side.dim];
            let args = compress::Backward {
                config,
                packing,
                x: side.rows[0].tensor(shape)?,
                position: None,
                phi: Phi::Weighted { weight: side.weight.tensor(weights)? },
                d_blocks: gradients.blocks.tensor([count, groups, side.dim])?,
                dx: gradients.rows[0].tensor_mut(shape)?,
                d_position: None,
                d_phi: PhiGrad::Weighted { weight: gradients.weight.tensor_mut(weights)? },
            };
            compress::backward(backend, args)?;
        }
        Ok(())
    }

    fn forward(&mut self) -> Result<()> {
        let Self { backend, config, packing, q, gates, sides, block_indices, branches, lse, o, .. } = self;
        let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
        let out = [n, heads, config.head_dim_v()];
        let cu_blocks = packing.cu_blocks(config)?;
        let offsets = [&cu_blocks, packing.cu_seqlens(), packing.cu_seqlens()];
        let packed = |rows: [_; 3]| std::array::from_fn(|branch| Rows::packed(rows[branch], offsets[branch]));
        let args = nsa::Forward {
            config,
            packing,
            q: q.tensor([n, heads, config.head_dim_qk()])?,
            k: packed(sides[0].rows(cu_blocks.total(), [n, groups])?),
            v: packed(sides[1].rows(cu_blocks.total(), [n, groups])?),
            gates: gates.tensor([n, heads, 3])?,
            selection: nsa::Selection::Compute(block_indices.tensor_mut([n, groups, config.select_count()])?),
            saved: nsa::Saved { o: all_mut(branches, [out; 3])?, lse: all_mut(lse, [[n, heads]; 3])? },
            o: o.tensor_mut(out)?,
        };
        nsa::forward(backend, args)
    }

    fn backward(&mut self) -> Result<()> {
        let Self { backend, config, packing, q, gates, d_o, block_indices, branches, lse, dq, d_gates, .. } = self;
        let (n, heads, groups) = (packing.num_tokens(), config.num_heads(), config.num_kv_heads());
        let (of_q, out) = ([n, heads, config.head_dim_qk()], [n, heads, config.head_dim_v()]);
        let blocks = packing.cu_blocks(config)?.total();
        let ([k, v], [dk, dv]) = (&self.sides, &mut self.gradients);
        let shapes = |dim| [[blocks, groups, dim], [n, groups, dim], [n, groups, dim]];
        let args = nsa::Backward {
            config,
            packing,
            q: q.tensor(of_q)?,
            k: k.rows(blocks, [n, groups])?,
            v: v.rows(blocks, [n, groups])?,
            gates: gates.tensor([n, heads, 3])?,
            block_indices: block_indices.tensor([n, groups, config.select_count()])?,
            branches: all(branches.each_ref(), [out; 3])?,
            lse: all(lse.each_ref(), [[n, heads]; 3])?,
            d_o: d_o.tensor(out)?,
            dq: dq.tensor_mut(of_q)?,
            dk: dk.of_rows(shapes(k.dim))?,
            dv: dv.of_rows(shapes(v.dim))?,
            d_gates: d_gates.tensor_mut([n, heads, 3])?,
        };
        nsa::backward(backend, args)
    }

    /// All that was written, which is then overwritten.
    fn take(&mut self) -> Vec<f64> {
        let mut all = Vec::new();
        for buffer in self.branches.iter_mut().chain([&mut self.o]) {
            all.extend(take(buffer, bf16::NAN).iter().map(|x| f64::from(x.to_f32())));
        }
        let of_sides =
            self.gradients.iter_mut().flat_map(|side| side.rows.iter_mut().chain([&mut side.blocks, &mut side.weight]));
        for buffer in self.lse.iter_mut().chain([&mut self.dq, &mut self.d_gates]).chain(of_sides) {
            all.extend(take(buffer, f32::NAN).into_iter().map(f64::from));
        }
        all.extend(take(&mut self.block_indices, -9).into_iter().map(f64::from));
        all
    }
}

impl Side {
    /// Blocks and rows as the branches take them.
    fn rows(&self, blocks: usize, [n, groups]: [usize; 2]) -> Result<[Tensor<'_, bf16, 3>; 3]> {
        let shape = [n, groups, self.dim];
        let blocks = [blocks, groups, self.dim];
        Ok([self.blocks.tensor(blocks)?, self.rows[1].tensor(shape)?, self.rows[2].tensor(shape)?])
    }
}

impl Gradients {
    fn of_rows(&mut self, shapes: [[usize; 3]; 3]) -> Result<[TensorMut<'_, f32, 3>; 3]> {
        let [_, slc, win] = &mut self.rows;
        Ok([self.blocks.tensor_mut(shapes[0])?, slc.tensor_mut(shapes[1])?, win.tensor_mut(shapes[2])?])
    }
}

fn all<T: bytemuck::Pod, const N: usize>(
    buffers: [&Buffer<T>; 3],
    shapes: [[usize; N]; 3],
) -> Result<[Tensor<'_, T, N>; 3]> {
    let [a, b, c] = buffers;
    Ok([a.tensor(shapes[0])?, b.tensor(shapes[1])?, c.tensor(shapes[2])?])
}

fn all_mut<T: bytemuck::Pod, const N: usize>(
    buffers: &mut [Buffer<T>; 3],
    shapes: [[usize; N]; 3],
) -> Result<[TensorMut<'_, T, N>; 3]> {
    let [a, b, c] = buffers;
    Ok([a.tensor_mut(shapes[0])?, b.tensor_mut(shapes[1])?, c.tensor_mut(shapes[2])?])
}

fn take<T: bytemuck::Pod>(buffer: &mut Buffer<T>, rest: T) -> Vec<T> {
    let mut data = vec![rest; buffer.len()];
    buffer.read(&mut data).expect("there");
    buffer.write(&vec![rest; data.len()]).expect("there");
    data
}

fn device() -> (Backend, Cuda) {
    let backend = Backend::cuda(0).expect("the simulator");
    let Backend::Cuda(cuda) = backend.clone() else { panic!("a CUDA device") };
    (backend, cuda)
}

fn bits(all: &[f64]) -> Vec<u64> {
    all.iter().map(|x| x.to_bits()).collect()
}

/// Forward, whose selected blocks gather queries, and backward give the same bits with memory of their own, in a workspace, and as a graph that was recorded in it;
/// and in a workspace that has been lent to other shapes before.
#[test]
fn the_operator_is_recorded() {
    on_an_a100("workspace::the_operator_is_recorded", || {
        let (backend, cuda) = device();
        let mut operator = Operator::new(&backend, &[355, 0, 1, 20]);
        operator.run().expect("runs");
        let expected = bits(&operator.take());
        let mut workspace = Workspace::new(&cuda);
        let mut other = Operator::new(&backend, &[40]);
        cuda.with_workspace(&mut workspace, || other.run()).expect("runs");
        let few = workspace.bytes();
        for _ in 0..2 {
            cuda.with_workspace(&mut workspace, || operator.run()).expect("runs");
            assert_eq!(bits(&operator.take()), expected);
        }
        let most = workspace.bytes();
        assert!(0 < few && few < most, "{few}, {most}");
        let graph = cuda.record(|| cuda.with_workspace(&mut workspace, || operator.run())).expect("recorded");
        assert!(operator.take().iter().all(|x| x.is_nan() || *x == -9.0), "nothing was done");
        cuda.with_workspace(&mut workspace, || other.run()).expect("runs");
        for _ in 0..2 {
            graph.launch().expect("the graph");
            assert_eq!(bits(&operator.take()), expected);
        }
        assert_eq!(workspace.bytes(), most);
    });
}

/// A workspace of what is needed is enough, for the operator and φ: it can be recorded in once tables are there.
#[test]
fn what_is_needed_is_enough() {
    on_an_a100("workspace::what_is_needed_is_enough", || {
        let (backend, cuda) = device();
        let mut operator = Operator::new(&backend, &[355, 0, 1, 20]);
        let config = operator.config.clone();
        // What is asked without a device is an answer for this one.
        let of = |device: &Device| (device.capability, device.multiprocessors, device.shared_bytes);
        assert_eq!(of(&Device::a100()), of(cuda.device()));
        let needs = cuda.needs(&config, &operator.packing, DType::Bf16).expect("short");
        let of_phi = |dim| {
            let given = PhiParts::default();
            needs.compress_forward(dim, given).max(needs.compress_backward(dim, given))
        };
        let of_operator = needs.nsa_forward().max(needs.nsa_backward());
        let bytes = of_operator.max(of_phi(config.head_dim_qk())).max(of_phi(config.head_dim_v()));
        let mut workspace = Workspace::with_bytes(&cuda, bytes).expect("memory");
        for _ in 0..2 {
            cuda.with_workspace(&mut workspace, || operator.run()).expect("runs");
            assert_eq!(workspace.bytes(), bytes);
        }
        let graph = cuda.record(|| cuda.with_workspace(&mut workspace, || operator.run())).expect("recorded");
        let expected = bits(&operator.take());
        graph.launch().expect("the graph");
        assert_eq!(bits(&operator.take()), expected);
    });
}

/// What a workspace lacks is not made while it is recorded.
#[test]
fn recording_needs_a_workspace_of_its_size() {
    on_an_a100("workspace::recording_needs_a_workspace_of_its_size", || {
        let (backend, cuda) = device();
        let mut operator = Operator::new(&backend, &[40]);
        operator.run().expect("compiled");
        let mut workspace = Workspace::new(&cuda);
        let recorded = cuda.record(|| cuda.with_workspace(&mut workspace, || operator.run()));
        let message = recorded.expect_err("too small").to_string();
        assert!(message.contains("Cuda::record") && message.contains("workspace lacks"), "{message}");
        cuda.with_workspace(&mut workspace, || operator.run()).expect("runs after the refusal");
    });
}

/// A decoding step of full attention.
#[test]
fn a_single_query_is_recorded() {
    on_an_a100("workspace::a_single_query_is_recorded", || {
        let (backend, cuda) = device();
        let config = NsaConfig::builder(8, 2, 40, 24).compress_kind(CompressKind::Mean).build().expect("valid");
        let packing = Packing::with_contexts(CuSeqlens::single(1).expect("short"), vec![2999]).expect("short");
        let offsets = packing.cu_keys().expect("short");
        let upload = |count, step| backend.upload(&numbers::<bf16>(count, step));
        let (q, k, v) = (upload(8 * 40, 31), upload(3000 * 2 * 40, 17), upload(3000 * 2 * 24, 23));
        let (mut o, mut lse) = (backend.alloc::<bf16>(8 * 24), backend.alloc::<f32>(8));
        let mut step = || {
            let args = dense::Forward {
                config: &config,
                packing: &packing,
                q: q.tensor([1, 8, 40])?,
                k: Rows::packed(k.tensor([3000, 2, 40])?, &offsets),
                v: Rows::packed(v.tensor([3000, 2, 24])?, &offsets),
                o: o.tensor_mut([1, 8, 24])?,
                lse: lse.tensor_mut([1, 8])?,
            };
            dense::forward(&backend, args)
        };
        let mut workspace = Workspace::new(&cuda);
        cuda.with_workspace(&mut workspace, &mut step).expect("runs");
        let graph = cuda.record(|| cuda.with_workspace(&mut workspace, &mut step)).expect("recorded");
        let expected = (take(&mut o, bf16::NAN), take(&mut lse, f32::NAN));
        for _ in 0..2 {
            graph.launch().expect("the graph");
            assert_eq!((take(&mut o, bf16::NAN), take(&mut lse, f32::NAN)), expected);
        }
    });
}
