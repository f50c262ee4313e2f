//! Index arithmetic and selection against plain enumerations.

use nsa_core::select::{NO_BLOCK, SelectScratch, goes_before, select_blocks};
use nsa_core::{CompressKind, NsaConfig, index};
use proptest::prelude::*;

/// Valid configurations with small blocks of every ratio.
fn configs() -> impl Strategy<Value = NsaConfig> {
    let blocks = (1usize..6, 1usize..5, 0usize..5);
    let counts = (0usize..4, 1usize..4, 0usize..6, 1usize..40);
    (blocks, counts).prop_map(|((stride, span, more), (initial, local, free, window))| {
        NsaConfig::builder(2, 1, 4, 4)
            .compress_kind(CompressKind::Mean)
            .compress_stride(stride)
            .compress_block(stride * span)
            .select_block(stride * (span + more))
            .select_initial(initial)
            .select_local(local)
            .select_count(initial + local + free)
            .window(window)
            .build()
            .expect("valid by construction")
    })
}

/// Starts of the compression blocks that end within the first `tokens` tokens.
fn blocks_within(config: &NsaConfig, tokens: usize) -> Vec<usize> {
    (0..tokens)
        .step_by(config.compress_stride())
        .filter(|start| (*start..*start + config.compress_block()).all(|s| s < tokens))
        .collect()
}

proptest! {
    #[test]
    fn blocks_are_those_that_fit(config in configs(), tokens in 0usize..150) {
        let starts = blocks_within(&config, tokens);
        prop_assert_eq!(index::num_blocks(&config, tokens), starts.len());
        for (i, &start) in starts.iter().enumerate() {
            prop_assert_eq!(index::block_tokens(&config, i), start..start + config.compress_block());
        }
        for t in 0..tokens {
            // i·d + l − 1 ≤ t, as the specification writes it.
            let visible = (0..=t).filter(|i| i * config.compress_stride() + config.compress_block() - 1 <= t).count();
            prop_assert_eq!(index::visible_blocks(&config, t), visible);
            let before = if t == 0 { 0 } else { index::visible_blocks(&config, t - 1) };
            prop_assert_eq!(index::completes_block(&config, t), visible == before + 1);
            prop_assert!(visible <= before + 1);
        }
    }

    #[test]
    fn candidates_are_the_blocks_begun(config in configs(), t in 0usize..200) {
        let block = config.select_block();
        let candidates = (0..=t).filter(|j| j * block <= t).count();
        prop_assert_eq!(index::num_candidates(&config, t), candidates);
        prop_assert_eq!(index::num_select_blocks(&config, t + 1), candidates);
        let selected = (0..t).map(|t| index::num_candidates(&config, t).min(config.select_count())).sum::<usize>();
        prop_assert_eq!(index::num_selected(&config, t), selected);
        // Together the candidates hold every token up to t once.
        let tokens: Vec<usize> = (0..candidates).flat_map(|j| index::select_tokens(&config, j, t)).collect();
        prop_assert_eq!(tokens, (0..=t).collect::<Vec<_>>());
        let mut forced: Vec<usize> = (0..candidates).take(config.select_initial()).collect();
        forced.extend((0..candidates).rev().take(config.select_local()));
        for j in 0..candidates {
            prop_assert_eq!(index::is_forced(&config, j, candidates), forced.contains(&j));
        }
    }

    #[test]
    fn importance_weights_are_the_double_sum(config in configs(), tokens in 1usize..150) {
        let blocks = index::num_blocks(&config, tokens);
        let chunks = config.select_block() / config.compress_stride();
        let span = config.compress_block() / config.compress_stride();
        for j in 0..index::num_select_blocks(&config, tokens) {
            let mut weights = vec![0usize; blocks];
            for m in 0..chunks {
                for r in 0..span {
                    if let Some(i) = (chunks * j + m).checked_sub(r) && i < blocks {
                        weights[i] += 1;
                    }
                }
            }
            for (i, &weight) in weights.iter().enumerate() {
                prop_assert_eq!(index::importance_weight(&config, i, j), weight, "i = {}, j = {}", i, j);
            }
            let nonzero: Vec<usize> = (0..blocks).filter(|&i| weights[i] > 0).collect();
            prop_assert_eq!(index::importance_blocks(&config, j, blocks).collect::<Vec<_>>(), nonzero);
        }
    }

    #[test]
    fn windows_and_rings(config in configs(), t in 0usize..100) {
        let window = config.window();
        let seen: Vec<usize> = (0..=t).filter(|s| t < s + window).collect();
        prop_assert_eq!(index::window_tokens(&config, t).collect::<Vec<_>>(), seen.clone());
        // A ring of w rows, written token by token, holds the window and nothing else.
        let mut ring = vec![None; window];
        (0..=t).for_each(|s| ring[index::ring_row(window, s)] = Some(s));
        prop_assert_eq!(ring.iter().flatten().count(), seen.len());
        for s in seen {
            prop_assert_eq!(ring[index::ring_row(window, s)], Some(s));
        }
    }

    #[test]
    fn a_step_reads_at_most_its_rows(config in configs(), context in 1usize..200, seed in any::<u64>()) {
        let t = context - 1;
        let scores: Vec<f64> = (0..index::num_candidates(&config, t)).map(|j| hash(seed, j)).collect();
        let selected: usize = selected(&config, t, &scores)
            .into_iter()
            .filter(|&j| j != NO_BLOCK)
            .map(|j| index::select_tokens(&config, j as usize, t).len())
            .sum();
        let rows = index::visible_blocks(&config, t) + selected + index::window_tokens(&config, t).len();
        prop_assert!(rows <= index::decode_rows(&config, context));
        // Reached when all of the context is selected, or all blocks are whole.
        if context % config.select_block() == 0 {
            prop_assert_eq!(rows, index::decode_rows(&config, context));
        }
    }

    #[test]
    fn selection_is_a_sort(config in configs(), t in 0usize..400, levels in 1u64..6, seed in any::<u64>()) {
        // Few levels make many ties.
        let scores: Vec<f64> =
            (0..index::num_candidates(&config, t)).map(|j| (hash(seed, j) * levels as f64).floor()).collect();
        prop_assert_eq!(selected(&config, t, &scores), by_sorting(&config, t, &scores));
        let distinct: Vec<f64> = (0..scores.len()).map(|j| hash(seed, j) - 0.5).collect();
        prop_assert_eq!(selected(&config, t, &distinct), by_sorting(&config, t, &distinct));
        let single: Vec<f32> = distinct.iter().map(|&score| score as f32).collect();
        let widened: Vec<f64> = single.iter().copied().map(f64::from).collect();
        prop_assert_eq!(selected(&config, t, &single), by_sorting(&config, t, &widened));
    }
}

/// A number in [0, 1) from a seed and an index.
fn hash(seed: u64, j: usize) -> f64 {
    let mut x = seed ^ (j as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// The selection, with scratch and output that were used before.
fn selected<R: nsa_core::Real>(config: &NsaConfig, t: usize, scores: &[R]) -> Vec<i32> {
    let (mut scratch, mut out) = (SelectScratch::default(), vec![i32::MIN; config.select_count()]);
    let longer = t + 100 * config.select_block();
    let ones = vec![R::one(); index::num_candidates(config, longer)];
    select_blocks(config, longer, &ones, &mut scratch, &mut out);
    select_blocks(config, t, scores, &mut scratch, &mut out);
    out
}

/// The specification's words: forced candidates, then the rest sorted by falling score and rising block.
fn by_sorting(config: &NsaConfig, t: usize, scores: &[f64]) -> Vec<i32> {
    let candidates = t / config.select_block() + 1;
    let (mut taken, mut rest): (Vec<usize>, Vec<usize>) = (0..candidates)
        .partition(|&j| j < config.select_initial() || j as i64 >= candidates as i64 - config.select_local() as i64);
    rest.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]).then(i.cmp(&j)));
    taken.extend(rest.into_iter().take(config.select_count().saturating_sub(taken.len())));
    taken.sort_unstable();
    let mut out: Vec<i32> = taken.into_iter().map(|j| j as i32).collect();
    out.resize(config.select_count(), NO_BLOCK);
    out
}

#[test]
fn order_of_scores() {
    assert!(goes_before(2.0, 9, 1.0, 0) && !goes_before(1.0, 0, 2.0, 9));
    assert!(goes_before(1.0, 3, 1.0, 4) && !goes_before(1.0, 4, 1.0, 3) && !goes_before(1.0, 3, 1.0, 3));
    // Zeros tie whatever their signs; a block that no head sees scores 0, never less.
    assert!(goes_before(-0.0, 0, 0.0, 1) && goes_before(f32::MIN_POSITIVE, 1, 0.0, 0));
}

#[test]
fn rows_of_the_papers_table_4() {
    let config = NsaConfig::paper();
    for (context, paper) in [(8192, 2048), (16384, 2560), (32768, 3584), (65536, 5632)] {
        // The paper counts s/d compressed rows where M(s) is one less.
        assert_eq!(index::decode_rows(&config, context) + 1, paper);
    }
    for (context, rows) in [(0, 0), (1, 2), (31, 62), (32, 65), (512, 31 + 512 + 512), (600, 36 + 600 + 512)] {
        assert_eq!(index::decode_rows(&config, context), rows);
    }
}

#[test]
fn weights_of_the_papers_blocks() {
    let config = NsaConfig::paper();
    let weights = |j: usize| (0..12).map(|i| index::importance_weight(&config, i, j)).collect::<Vec<_>>();
    assert_eq!(weights(0), [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(weights(1), [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]);
    assert_eq!(weights(2), [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 1]);
}
