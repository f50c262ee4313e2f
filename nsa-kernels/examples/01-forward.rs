//! One forward pass of the operator on two packed sequences: compress, then the three branches with their gate.
//!
//! `cargo run --release -p nsa-kernels --example 01-forward`

use nsa_core::{CompressKind, CuSeqlens, NsaConfig, Packing};
use nsa_kernels::op::{compress, nsa};
use nsa_kernels::{Backend, Result, Rows, Tensor, TensorMut};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn main() -> Result<()> {
    let (backend, why) = Backend::pick(None)?;
    println!("backend {}: {why}", backend.name());

    // 8 query heads on 2 KV heads, the paper's block sizes, averages for compression.
    let config = NsaConfig::builder(8, 2, 64, 64).compress_kind(CompressKind::Mean).build()?;
    let packing = Packing::new(CuSeqlens::from_lengths([3000, 1096])?);
    let (n, heads, groups, dim) = (packing.num_tokens(), 8, 2, 64);

    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let q = random(n * heads * dim);
    // Keys and values of the branches cmp, slc, win; a model projects each from the layer's input.
    let (k, v) = ([(); 3].map(|()| random(n * groups * dim)), [(); 3].map(|()| random(n * groups * dim)));
    let gates = vec![1.0 / 3.0; n * heads * 3];

    // φ: one compressed key and value every `compress_stride` tokens.
    let cu_blocks = packing.cu_blocks(&config)?;
    let blocks = cu_blocks.total();
    let [mut k_blocks, mut v_blocks] = [(); 2].map(|()| vec![0.0; blocks * groups * dim]);
    for (tokens, out) in [(&k[0], &mut k_blocks), (&v[0], &mut v_blocks)] {
        compress::forward(
            &backend,
            compress::Forward {
                config: &config,
                packing: &packing,
                x: Tensor::host(tokens, [n, groups, dim])?,
                position: None,
                phi: compress::Phi::Mean,
                blocks: TensorMut::host(out, [blocks, groups, dim])?,
            },
        )?;
    }

    let mut o = vec![0.0; n * heads * dim];
    let mut branches = [(); 3].map(|()| vec![0.0; n * heads * dim]);
    let mut lse = [(); 3].map(|()| vec![0.0; n * heads]);
    let mut indices = vec![0; n * groups * config.select_count()];
    let [o_cmp, o_slc, o_win] = branches.each_mut().map(|o| TensorMut::host(o, [n, heads, dim]));
    let [lse_cmp, lse_slc, lse_win] = lse.each_mut().map(|l| TensorMut::host(l, [n, heads]));
    let tokens = packing.cu_keys()?;
    nsa::forward(
        &backend,
        nsa::Forward {
            config: &config,
            packing: &packing,
            q: Tensor::host(&q, [n, heads, dim])?,
            k: [
                Rows::packed(Tensor::host(&k_blocks, [blocks, groups, dim])?, &cu_blocks),
                Rows::packed(Tensor::host(&k[1], [n, groups, dim])?, &tokens),
                Rows::packed(Tensor::host(&k[2], [n, groups, dim])?, &tokens),
            ],
            v: [
                Rows::packed(Tensor::host(&v_blocks, [blocks, groups, dim])?, &cu_blocks),
                Rows::packed(Tensor::host(&v[1], [n, groups, dim])?, &tokens),
                Rows::packed(Tensor::host(&v[2], [n, groups, dim])?, &tokens),
            ],
            gates: Tensor::host(&gates, [n, heads, 3])?,
            selection: nsa::Selection::Compute(TensorMut::host(&mut indices, [n, groups, config.select_count()])?),
            saved: nsa::Saved { o: [o_cmp?, o_slc?, o_win?], lse: [lse_cmp?, lse_slc?, lse_win?] },
            o: TensorMut::host(&mut o, [n, heads, dim])?,
        },
    )?;

    let last = &indices[(n - 1) * groups * config.select_count()..];
    println!("o of the last token, head 0: {:?} …", &o[(n - 1) * heads * dim..][..4]);
    println!("blocks that its first group selected: {:?}", &last[..config.select_count()]);
    Ok(())
}
